"""Protocols broken on purpose: by file, by what is run, and by what finds it, the code in which «this becomes→that».

As in ``fault_list``, whose faults change numbers: these change what one program may count on of another.
"""

# fmt: off
TICKETS, ONE_LAUNCH, MERGES, MERGES_BY_COLUMNS = "tickets", "one launch", "merges", "merges by columns"
BROKEN: dict[tuple[str, str], dict[str, dict[str, str]]] = {
    ("tickets.py", TICKETS): {
        "race": {
            "number taken by a load and a store":
                'ticket = tl.«atomic_add(counters, 1, sem="relaxed")'
                "→load(counters)\n    tl.store(counters, ticket + 1)»",
            "arrives without a barrier": "«    tl.debug_barrier()\n→»    is_last = tl.atomic_add",
            "arrives without order": 'sem="«acq_rel→relaxed»"',
            "arrives and publishes nothing": 'sem="«acq_rel→acquire»"',
            "arrives and sees nothing": 'sem="«acq_rel→release»"',
            "arrives for itself alone": 'sem="acq_rel"«→, scope="cta"»',
            "arrives by a load and a store":
                '«is_last = tl.atomic_add(counter, 1, sem="acq_rel")→before = tl.load(counter)\n'
                "    tl.store(counter, before + 1)\n    is_last = before» == arrivals - 1",
            "arrives, then looks who has":
                '«is_last =→tl.atomic_add(counter, 1, sem="acq_rel")\n    is_last =» '
                'tl.atomic_add(counter, «1→0», sem="acq_rel") == arrivals« - 1→»',
            "the first to arrive merges": '"acq_rel") == «arrivals - 1→0»',
            "the last but one merges": '"acq_rel") == arrivals - «1→2»',
            "opens without a barrier": "«    tl.debug_barrier()\n→»    tl.atomic_xchg",
            "opens without order": 'sem="«release→relaxed»"',
            "opens and publishes nothing": 'sem="«release→acquire»"',
            "opens for itself alone": 'sem="release"«→, scope="cta"»',
            "opens by a store":
                'tl.«atomic_xchg→store»(counters + 1 + channel_blocks + channel_block, 1«, sem="release"→»)',
            "waits without order": 'sem="«acquire→relaxed»"',
            "waits and sees nothing": 'sem="«acquire→release»"',
            "waits for itself alone": 'sem="acquire"«→, scope="cta"»',
            "waits by a load": 'tl.«atomic_add(gate, 0, sem="acquire")→load(gate, volatile=True)»',
            "waits until it is shut": '"acquire") «==→!=» 0',
            "waits for another block": "gate = counters + 1 + channel_blocks« + channel_block→»",
        },
        "deadlock": {
            "number by the grid": 'ticket = tl.«atomic_add(counters, 1, sem="relaxed")→program_id(0)»',
            "second phase before its first": "return second«→ == 0», following",
            "opens what nobody waits for": "tl.atomic_xchg(counters + 1« + channel_blocks→» + channel_block",
            "never opens": "tl.atomic_xchg(counters + 1 + channel_blocks + channel_block, «1→0»",
        },
    },
    ("tickets.py", MERGES): {
        "uninitialised": {
            "does not reset its counter": "«    tl.store(counter, 0, mask=is_last)\n→»",
            "resets its counter to one": "tl.store(counter, «0→1», mask",
        },
        "race": {
            "everybody resets the counter": "tl.store(counter, 0«, mask=is_last→»)",
            "resets the counter before it arrives":
                "«→tl.store(counter, 0)\n    »is_last = tl.atomic_add",
            "merges in groups arrive without a barrier": "«    tl.debug_barrier()\n→»    is_last = tl.atomic_add",
            "merges in groups arrive and publish nothing": 'sem="«acq_rel→acquire»"',
            "merges in groups arrive and see nothing": 'sem="«acq_rel→release»"',
        },
    },
    ("merging.py", MERGES): {
        "race": {
            "all groups arrive in one place": "walk.channel_block * groups« + group→»",
            "groups of all blocks arrive in one place": "BLOCK_C) + «walk.channel_block * groups + →»group",
            "groups arrive where blocks do": "at = «tl.cdiv(walk.C, BLOCK_C) + →»walk.channel_block * groups",
            "all blocks arrive in one place": "at = «walk.channel_block\n→0\n»",
            "a group is one program smaller": "count = tl.minimum(walk.programs - first, GROUP«→ - 1»)",
            "only the first groups are waited for": "count = tl.where(groups > 1, «groups→1», walk.programs)",
        },
        "uninitialised": {
            "counters are not cleared": "torch.«zeros→empty»(merge.counters",
            "one group more is waited for": "count = tl.where(groups > 1, groups«→ + 1», walk.programs)",
        },
    },
    ("merging.py", MERGES_BY_COLUMNS): {
        "race": {
            "a share waits for one of its blocks": "Round(counters + number, «blocks * →»walk.programs",
            "a share waits for its blocks but the last":
                "blocks = tl.cdiv(tl.minimum((number + 1) * COLUMNS, walk.C)«→ - BLOCK_C», BLOCK_C)",
        },
        "uninitialised": {
            "a block leaves its second share to others":
                "tl.cdiv(«tl.minimum(first + BLOCK_C, walk.C)→first + 1», COLUMNS)",
        },
    },
    ("statistics.py", MERGES): {
        "race": {
            "statistics read before the counter is":
                "goes_on = «is_last_to_arrive(turn.counter, turn.arrivals)→walk.program == turn.parts.first»",
            "statistics merged at every arrival": "turn.arrivals)\n            if goes_on«→ | True»:",
            "everybody goes on to the second round": "goes_on |= «PLANE > 1→True»",
            "statistics of a group in the place of none":
                "to = partials + «parts.first→parts.first * 0» * walk.C",
        },
    },
    ("reduce.py", MERGES): {
        "race": {
            "sums read before the counter is":
                "goes_on = «is_last_to_arrive(turn.counter, turn.arrivals)→walk.program == turn.parts.first»",
            "sums merged at every arrival": "turn.arrivals)\n            if goes_on«→ | True»:",
            "everybody goes on to the sums' second round": "goes_on |= «merging.PLANE > 1→True»",
        },
    },
    ("forward.py", ONE_LAUNCH): {
        "deadlock": {
            "one place where all blocks arrive": "is_last_to_arrive(counters + 1« + channel_block→», programs)",
        },
        "race": {
            "forward opens before it merges":
                "«→open_second_phase(counters, channel_block, channel_blocks)\n                »counts =",
            "forward opens at every arrival": "«    →»            open_second_phase(",
            "forward merges at every arrival":
                "if is_last_to_arrive(counters + 1 + channel_block, programs)«→ | True»:",
            "forward does not wait": "«wait_for_second_phase(counters, channel_block, channel_blocks)→pass»",
            "forward's first program alone waits": "            «→if program == 0:\n                »wait_for",
        },
        "uninitialised": {
            "forward's counters are not cleared": "x.«new_zeros→new_empty»(launch.counters",
        },
    },
    ("backward.py", ONE_LAUNCH): {
        "race": {
            "backward opens before it merges":
                "«→open_second_phase(counters, channel_block, channel_blocks)\n                »"
                "parameters = ParameterGradients",
            "backward opens at every arrival": "«    →»            open_second_phase(",
            "backward merges at every arrival":
                "if is_last_to_arrive(counters + 1 + channel_block, programs)«→ | True»:",
            "backward does not wait": "«wait_for_second_phase(counters, channel_block, channel_blocks)→pass»",
        },
        "uninitialised": {
            "backward's counters are not cleared": "like.«new_zeros→new_empty»(launch.counters",
        },
    },
    ("statistics.py", ONE_LAUNCH): {
        "race": {
            "partial results in one place": "tl.store(partials + «walk.program→0» * walk.C + c, centre",
        },
    },
}
# fmt: on
