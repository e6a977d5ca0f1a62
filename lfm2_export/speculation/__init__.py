"""Speculative decoding: tokens that something cheap proposes are verified in one pass of the program, which reads its
weights once for all of them.

In: a runner and a drafter. Out: a runner whose ``decode`` gives what the plain one gives, most of the time without a
pass of its own. The loop that chooses tokens does not change: a proposal counts as accepted when the token that was
chosen is the one that was proposed. Proposals are certain (a drafter says one token, no distribution), so this is
rejection sampling against the settings' own distribution (Leviathan et al. 2023), and a seed draws the same tokens.
"""

from lfm2_export.speculation.controller import Controller as Controller
from lfm2_export.speculation.controller import Report as Report
from lfm2_export.speculation.drafters import Draft as Draft
from lfm2_export.speculation.drafters import Drafter as Drafter
from lfm2_export.speculation.dspark import StreamDrafter as StreamDrafter
from lfm2_export.speculation.lookup import PromptLookup as PromptLookup
from lfm2_export.speculation.model import ModelDrafter as ModelDrafter
from lfm2_export.speculation.opening import LOOKUP as LOOKUP
from lfm2_export.speculation.opening import speculating as speculating
from lfm2_export.speculation.runner import DEFAULT_DRAFT_TOKENS as DEFAULT_DRAFT_TOKENS
from lfm2_export.speculation.runner import SpeculativeRunner as SpeculativeRunner
