"""Feature: the optional parts of a step that some sequence in it uses. Shared by batch.py and the device code."""

import enum


class Feature(enum.IntFlag):
    """Bit set carried by each batch: the host chooses programs by it, and the sampler skips what nobody uses."""

    NONE = 0
    RANDOM = 1  # somebody samples with a temperature
    TRUNCATE = 2  # somebody uses top-k, top-p or min-p
    PENALTIES = 4
    ADJUST = 8  # somebody has a logit bias or a minimum length
    LOGPROBS = 16
    PROMPT_LOGPROBS = 32
    BANS = 64  # somebody has bad words
    MASK = 128  # somebody may choose among some tokens only
    GRAMMAR = 256  # somebody has a grammar, whose mask is known only when the tokens of all steps before are
    HIDDEN = 512  # somebody wants the hidden state of the prompt's last token


#: The features that need the full sampler. A step with none of them takes each row's most likely token.
SAMPLING = ~(Feature.PROMPT_LOGPROBS | Feature.HIDDEN)
