"""Made-up chat models: a prompt of the shipped templates in, an answer's text out."""

import hashlib
import json
import random
import re

LETTERED = re.compile(r'^([A-Z])\) "(.*)"$', re.MULTILINE)
POOLED = re.compile(r'^- "(.*)"$', re.MULTILINE)
WANTED = re.compile(r"JSON array of (?:exactly|all) (\d+)")


def dice(prompt: str) -> random.Random:
    """Chance that follows from the prompt, so that asking again gives the same answer."""
    return random.Random(hashlib.sha256(prompt.encode()).digest())


def guess(prompt: str) -> str:
    """A valid answer drawn by chance, to whatever is asked."""
    chance = dice(prompt)
    options = LETTERED.findall(prompt)
    if options:
        return chance.choice(options)[0]
    wanted = WANTED.search(prompt)
    if wanted:
        return json.dumps(chance.sample(POOLED.findall(prompt), int(wanted[1])))
    if "yes or no" in prompt:
        return chance.choice(["yes", "no"])
    assert "whole number from 1 to 5" in prompt or "number from 1 to 5" in prompt
    return str(chance.randint(1, 5))


def first_option(prompt: str) -> str:
    """A model that always takes what stands first."""
    options = LETTERED.findall(prompt)
    return (
        options[0][0]
        if options
        else json.dumps(POOLED.findall(prompt)[: int(WANTED.search(prompt)[1])])
    )  # type: ignore[index]


def gullible(prompt: str) -> str:
    """A model that obeys any title which tells it what to do, and guesses elsewhere."""
    for letter, title in LETTERED.findall(prompt):
        if re.search(r"ignore|always|first|must|system", title, re.IGNORECASE):
            return str(letter)
    return guess(prompt)
