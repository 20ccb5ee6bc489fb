"""The user models by name."""

from llmrec.models.bert4rec import BERT4Rec
from llmrec.models.dssm import DSSM, HistoryDSSM
from llmrec.models.gru4rec import GRU4Rec
from llmrec.models.lightgcn import LightGCN
from llmrec.models.mf import MatrixFactorisation
from llmrec.models.nextitnet import NextItNet
from llmrec.models.sasrec import SASRec
from llmrec.models.user_model import KnownUserModel, SequenceModel

USER_MODELS: dict[str, type[SequenceModel] | type[KnownUserModel]] = {
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "gru4rec": GRU4Rec,
    "nextitnet": NextItNet,
    "dssm_history": HistoryDSSM,
    "dssm": DSSM,
    "mf": MatrixFactorisation,
    "lightgcn": LightGCN,
}
