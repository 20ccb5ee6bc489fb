"""The options that say which data to read and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.data.simulated import SimulatedConfig


@dataclass(frozen=True)
class DataConfig:
    """Which interactions and items to read, in which order, and whom to keep."""

    source: str = "simulated"
    """`simulated`, or a folder or file: absolute, relative to the working directory, or under the
    data root (environment variable LLMREC_DATA, default data/). A folder that `llmrec data prepare`
    wrote brings all other data options with it."""
    format: Literal["auto", "table", "recbole"] = "auto"
    """table: interactions.{csv,tsv,parquet} with an optional items file, or one such file; recbole:
    atomic files .inter and .item; auto: by the names of the files."""
    user_column: str = "user_id"
    """Column of the user's id."""
    item_column: str = "item_id"
    """Column of the item's id, in the interactions and in the items."""
    order: Literal["auto", "timestamp", "position", "file"] = "auto"
    """What orders a user's interactions; ties keep the order of the file. auto: the timestamp
    column where there is one, else the position column, else the file. With position or file the
    timestamps are not read."""
    timestamp_column: str = "timestamp"
    """Column of the time: Unix seconds, a date type, or text such as 2024-05-01 12:30:00."""
    position_column: str = "position"
    """Column of the place in the user's sequence."""
    rating_column: str = "rating"
    """Column of the rating; read where present."""
    review_column: str = "review"
    """Column of what the user wrote of the item; read where present, unless it is `none`. This and
    the next three stand in the interactions; a column that is read so is no field of the item."""
    headline_column: str = "headline"
    """Column of the review's headline; read where present, unless it is `none`."""
    explanation_column: str = "explanation"
    """Column of a sentence that says why the user rated so; read where present, unless it is
    `none`."""
    feature_column: str = "feature"
    """Column of a word for what that sentence speaks of, such as `battery`; read where present,
    unless it is `none`."""
    item_text: str = "title"
    """Template that renders an item's text from its fields: a name from prompts/item_text/, or a
    path ending in .jinja; `none` reads no text."""
    min_user_interactions: int = 5
    """Interactions; users with fewer are dropped."""
    max_user_interactions: int | Literal["all"] = "all"
    """Interactions kept per user, the most recent ones."""
    sample_users: int | Literal["all"] = "all"
    """Users kept, drawn at random from those with enough interactions; the catalogue is then what
    they met. For first looks: with fewer users every item is trained on less."""
    sample_seed: int = 0
    """Seed of that draw: another seed, other users. It is not run.seed, so that runs of several
    seeds share their data; a larger sample of the same seed holds the smaller."""
    simulated: SimulatedConfig = field(default_factory=SimulatedConfig)
    """The simulated data, where source is `simulated`."""
