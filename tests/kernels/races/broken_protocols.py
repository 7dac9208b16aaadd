"""Protocols broken on purpose: by file and what finds it, the code in which «this becomes→that».

As in ``fault_list``, whose faults change numbers: these change what one program may count on of another.
"""

# fmt: off
BROKEN: dict[str, dict[str, dict[str, str]]] = {
    "tickets.py": {
        "race": {
            "number taken by a load and a store":
                'ticket = tl.«atomic_add(counters, 1, sem="relaxed")'
                "→load(counters)\n    tl.store(counters, ticket + 1)»",
            "arrives without a barrier": "«    tl.debug_barrier()\n→»    return tl.atomic_add",
            "arrives without order": 'sem="«acq_rel→relaxed»"',
            "arrives and publishes nothing": 'sem="«acq_rel→acquire»"',
            "arrives and sees nothing": 'sem="«acq_rel→release»"',
            "arrives for itself alone": 'sem="acq_rel"«→, scope="cta"»',
            "arrives by a load and a store":
                '«return tl.atomic_add(counters + 1 + channel_block, 1, sem="acq_rel")'
                "→before = tl.load(counters + 1 + channel_block)\n"
                "    tl.store(counters + 1 + channel_block, before + 1)\n    return before» == programs - 1",
            "arrives, then looks who has":
                '«return→tl.atomic_add(counters + 1 + channel_block, 1, sem="acq_rel")\n    return» '
                'tl.atomic_add(counters + 1 + channel_block, «1→0», sem="acq_rel") == programs« - 1→»',
            "the first to arrive merges": '"acq_rel") == «programs - 1→0»',
            "the last but one merges": '"acq_rel") == programs - «1→2»',
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
            "one place where all blocks arrive": "tl.atomic_add(counters + 1« + channel_block→», 1",
            "opens what nobody waits for": "tl.atomic_xchg(counters + 1« + channel_blocks→» + channel_block",
            "never opens": "tl.atomic_xchg(counters + 1 + channel_blocks + channel_block, «1→0»",
        },
    },
    "forward.py": {
        "race": {
            "forward opens before it merges":
                "«→open_second_phase(counters, channel_block, channel_blocks)\n                »counts =",
            "forward opens at every arrival": "«    →»            open_second_phase(",
            "forward merges at every arrival": "if is_last_to_arrive(counters, channel_block, programs)«→ | True»:",
            "forward does not wait": "«wait_for_second_phase(counters, channel_block, channel_blocks)→pass»",
            "forward's first program alone waits": "            «→if program == 0:\n                »wait_for",
        },
        "uninitialised": {
            "forward's counters are not cleared": "x.«new_zeros→new_empty»(launch.counters",
        },
    },
    "backward.py": {
        "race": {
            "backward opens before it merges":
                "«→open_second_phase(counters, channel_block, channel_blocks)\n                »"
                "parameters = ParameterGradients",
            "backward opens at every arrival": "«    →»            open_second_phase(",
            "backward merges at every arrival": "if is_last_to_arrive(counters, channel_block, programs)«→ | True»:",
            "backward does not wait": "«wait_for_second_phase(counters, channel_block, channel_blocks)→pass»",
        },
        "uninitialised": {
            "backward's counters are not cleared": "x.«new_zeros→new_empty»(launch.counters",
        },
    },
    "statistics.py": {
        "race": {
            "partial results in one place": "tl.store(partials + «walk.program→0» * walk.C + c, centre",
        },
    },
}
# fmt: on
