"""Feature: the optional parts of a step that some sequence in it uses. Shared by batch.py and the device code."""

import enum


class Feature(enum.IntFlag):
    """Bit set carried by each batch; the device skips what nobody uses, without another compiled program."""

    NONE = 0
    RANDOM = 1  # somebody samples with a temperature
    TRUNCATE = 2  # somebody uses top-k, top-p or min-p
    PENALTIES = 4
    ADJUST = 8  # somebody has a logit bias or a minimum length
    LOGPROBS = 16
    PROMPT_LOGPROBS = 32
    BANS = 64  # somebody has bad words
    MASK = 128  # somebody may choose among some tokens only
    HIDDEN = 512  # somebody wants the hidden state of the prompt's last token
    DEFERRED = 256  # the step leaves sampling to a second program, which is given the mask of a grammar
