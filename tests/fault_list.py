"""Deliberate faults by name, for each file and the tests that should see them: code in which «this becomes→that».

The code stands exactly once in its file. Files and tests are named without their folders, tests as pytest takes them.
"""

LOOPS = "test_functional.py::test_values_when_every_loop_turns"
VALUES = "test_functional.py::test_values"
DTYPES = "test_functional.py::test_two_dtypes_promote_as_in_eager"
ONE_LAUNCH = "test_one_launch.py::test_values"
MEMORY = "test_memory.py::test_outputs_whole_and_surroundings_untouched"
RAGGED = "test_memory.py::test_a_ragged_last_slice_writes_nothing_beside_it"
SECOND = "test_gradients.py::test_gradient_penalty"
CREATE_GRAPH = "test_gradients.py::test_create_graph_changes_no_gradient"
OPCHECK = "test_compile.py::test_opcheck_of_two_dtypes"
ONE_PROCESS = "test_synchronised.py::test_a_group_of_one"
MERGE = "test_synchronised.py::test_merge_of_processes"
PROCESSES = "'test_synchronised.py::test_processes[torch-2]'"
TWO = "-k 'not norm+relu and not add+relu'"
TRAINING = "-k training"
TWO_FROZEN = "-k 'frozen and not norm+relu and not add+relu'"
MIDDLE = "-k add+relu"
FROZEN = "-k frozen"
HOOKS = "test_fuse_hooks.py"

# fmt: off
BY_FILE_AND_TESTS: dict[tuple[str, str], dict[str, str]] = {
    ("tile.py", f"{LOOPS} {TRAINING}"): {
        "count of positions beyond the last": "count += «s_inside→tl.full(s_inside.shape, 1, tl.int1)».to(",
        "carried a block late": "carries = block >«=→» stride.in_group",
        "tile's first position forgotten": "(tl.cast(C, tl.int64) * S)« + s0→»",
        "channels_last tile's first channel forgotten": "start = «c0 + →»s0 * C if",
        "blocks reversed one too far": ") - «1 - →»channel_block",
        "program and block exchanged":
            "return walk_of(number «// programs, number %→% programs, number //» programs,"},
    ("tile.py", VALUES): {
        "M2 with the old mean twice": "m2 += delta * «tl.where(inside, value - mean, 0)→delta»",
        "lanes' M2 without the spread of their means": "tl.sum(m2 + «→0 * »deviation",
        "weight without rstd": "scale = «r * →»tl.load(",
        "order reversed one too far": "block = walk.blocks - «1 - →»block"},
    ("tile.py", MEMORY): {
        "one position beyond the end": "block == blocks - 1, left«→ + 1», BLOCK_S",
        "one channel beyond the end": "<«→=» tl.minimum(left, BLOCK)",
        "one vector element beyond the end": "return c, c <«→=» C"},
    ("tile.py", f"{VALUES} {MIDDLE}"): {
        "mask bits in another order": ".to(tl.int32)[:, :, None] >> «→7 - »tl.arange(0, 8)",
        "mask's last bit lost": "return «tl.sum(bits, axis=2→(tl.sum(bits, axis=2) & 127»).to(tl.uint8)",
        "mask's ragged byte lost": "«tl.cdiv(walk.S, 8)→walk.S // 8»",
        "channels_last mask's ragged byte lost": "«tl.cdiv(walk.C, 8)→walk.C // 8»"},
    ("tile.py", f"{VALUES} {FROZEN}"): {"frozen without eps": "r = 1 / tl.sqrt(r« + EPS→»)"},
    ("tile.py", "test_accuracy.py::test_the_mean_is_exact_to_rounding"): {
        "merge of lanes without the mean's correction":
            "«    centre += tl.sum((mean - by_channel(centre, CHANNELS_LAST)) * share, axis=AXIS) / total\n→»"},
    ("tile.py", "test_accuracy.py::test_outputs_are_rounded_to_nearest"): {
        "truncated, not rounded": "rounded = «(bits + 0x7FFF + ((bits >> 16) & 1))→bits»"},
    ("tile.py", "test_functional.py::test_a_variance_that_overflows_is_infinite"): {
        "0·Inf in the merge of lanes": "deviation * «(deviation * share)→deviation * share»"},
    ("statistics.py", f"{LOOPS} {TRAINING}"): {
        "second tile read at the first": "tl.load(at« + quads.stride→» + local, mask=lanes",
        "ragged end left out": "tl.where(quads.ragged, «quads.outer→0», 0)",
        "spread of pairs twice": "m2_pairs * «0.25→0.5»",
        "quads weighed as one value": "(«8→2» * taken * share)",
        "a quad counted as one": "+ «4 * →»taken",
        "merge weighs with the whole count": "share * «(count - added)→count»[:, None]",
        "merge without its later programs": "range(0, «parts.count * merging.PLANE→merging.BLOCK_P»,",
        "a group's count not merged": "tl.store(counts + parts.first, «total→0 * total»)",
        "a group's M2 in the place of its mean": "tl.store(to« + walk.programs * walk.C→», m2",
        "merge adds means whole": "(count - added)[:, None])\n        mean += delta« * share→»\n",
        "first norm takes a quad of the second": "is_second = number >«=→» of_norm"},
    ("statistics.py", VALUES): {
        "biased by one value": "1 / tl.sqrt(m2 / «M→(M - 1)» + EPS)",
        "biased running variance": "m2 / «(M - 1)→M», running.momentum"},
    ("statistics.py", f"{VALUES} {TWO}"): {
        "first eps for the second norm": "channels, c, c_inside, «RESIDUAL_EPS→EPS»",
        "first running mean for both norms": "Running(«residual_running_mean→running_mean», residual_running_var"},
    ("statistics.py", "test_kernels.py::test_statistics_for_several_processes"): {
        "second norm's results in the first's place": "partials += «→0 * »is_second"},
    ("statistics.py", ONE_LAUNCH): {
        "counts of every block in one place": "walk.«channel_block * walk.programs + walk.→»program, total"},
    ("statistics.py", "test_accuracy.py::test_running_statistics_to_the_bit"): {
        "momentum of the old value": "«(1 - factor) * old + factor→factor * old + (1 - factor)» * new"},
    ("statistics.py", "test_accuracy.py::test_momentum_is_not_rounded_to_float32"): {
        "momentum's low part not passed": "return high, «norm.momentum - high→0.0»",
        "momentum's low part not added": "« + tl.cast(momentum_rest, new.dtype)→»"},
    ("statistics.py", MEMORY): {"no room for the counts": "(2 * call.g.columns« + launch.channel_blocks→»)"},
    ("statistics.py", "test_functional.py::test_a_variance_that_overflows_is_infinite"): {
        "0·Inf in the merge of programs":
            "delta * «(delta * share * (count - added)[:, None])→delta * share * (count - added)[:, None]»"},
    ("normalise.py", f"{VALUES} {MIDDLE}"): {
        "shortcut subtracted": "            z «+→-»= s\n"},
    ("normalise.py", f"{VALUES} {FROZEN}"): {"running variance taken for rstd": '"FROZEN": «stats is None→False»'},
    ("normalise.py", f"{VALUES} {TWO_FROZEN}"): {
        "first eps for a frozen second norm": '"RESIDUAL_EPS": call.«second→norm».eps'},
    ("reduce.py", f"{LOOPS} {TRAINING}"): {"sums without their earlier programs": "second «+→»= tl.load(partials"},
    ("reduce.py", VALUES): {
        "x̂ without rstd": "sum_dz_x *= «by_channel(r, tiling.CHANNELS_LAST)→1»",
        "sign of the weight's gradient": "store(out.weight + c, «→-»found[1]"},
    ("reduce.py", f"{VALUES} {TWO}"): {
        "ŝ with the first rstd": "r = load_rstd(«second→norm», c,",
        "second weight's gradient not stored": "«store(out.residual_weight + c, found[2], c_inside)→pass»"},
    ("reduce.py", f"{VALUES} {FROZEN}"): {"frozen gradient is dz": "dz« * own.scale→», inside"},
    ("reduce.py", f"{VALUES} {TWO_FROZEN}"): {
        "frozen second gradient with the first weight": "dz * «other→own».scale, inside",
        "first eps for the frozen second gradient": '"RESIDUAL_EPS": call.eps[«1→0»]'},
    ("reduce.py", "test_sequential.py::test_chain_of_four"): {
        "fork's gradient lost": "total += «→0 * »tl.load(gradient.dy_fork"},
    ("apply.py", VALUES): {
        "mean of dz forgotten": "return slope, «-→0 * »scale",
        "mean over one value less": "other=0) / «sums.M→(sums.M - 1)»"},
    ("apply.py", "test_sequential.py::test_chain_of_four"): {
        "fork's gradient twice": "((dz, «None→call.gradients[1]») if is_dz else"},
    ("apply.py", DTYPES): {"dx from a rounded dz": "dz is not None« and dz.dtype is call.gradients[0].dtype→»"},
    ("forward.py", ONE_LAUNCH): {"first eps for the second norm in one launch": "C, c, c_inside, «RESIDUAL_EPS→EPS»"},
    ("forward.py", f"{MEMORY} -k one"): {"forward's counters not cleared": "x.«new_zeros→new_empty»(launch.counters"},
    ("forward.py", RAGGED): {"forward's last slice one block too long": "if channel_block <«→=» channel_blocks"},
    ("call.py", DTYPES): {"result in the input's dtype": "«torch.promote_types(x.dtype, residual.dtype)→x.dtype»"},
    ("backward.py", ONE_LAUNCH): {"dy taken for dz in one launch": "walk, «False→True», activation"},
    ("backward.py", f"{MEMORY} -k one"): {
        "backward's counters not cleared": "like.«new_zeros→new_empty»(launch.counters"},
    ("backward.py", RAGGED): {"backward's last slice one block too long": "if channel_block <«→=» channel_blocks"},
    ("launching.py", f"{VALUES} {TWO_FROZEN}"): {
        "first norm's mean for a frozen second": "(«residual_norm→norm».running_mean, residual_norm.running_var) if"},
    ("launching.py", DTYPES): {
        "dz rounded to the input's dtype": "torch.empty_like(self.like«, dtype=self.dtypes[1]→») if of_residual",
        "float64 residual computed in float32": "found.g, accumulator(x«, residual→»)",
        "float64 gradient summed in float32": "accumulator(like, residual«, dy→»)"},
    ("tickets.py", "test_one_launch.py::test_order_of_the_work"): {
        "second phase before its first": "turn // 2« - 1→», (turn",
        "last slice not normalised": "turn == 2 * slices« - 1→»",
        "program and block of a ticket exchanged":
            "within «% slice_blocks, within //→// slice_blocks, within %» slice_blocks"},
    ("tickets.py", ONE_LAUNCH): {"merged by the first to arrive": 'sem="acq_rel") == «arrivals - 1→0»'},
    ("merging.py", MEMORY): {"a partial result beyond the last": "exists = entry <«→=» parts.count * merging.PLANE"},
    ("merging.py", f"{LOOPS} {TRAINING}"): {
        "the groups' results not where they are": "stride = tl.where(groups > 1, «GROUP→1», 1)",
        "a last group as large as the others": "count = «tl.minimum(walk.programs - first, GROUP)→GROUP»\n"},
    ("merging.py", f"{VALUES} -k 'training and 40'"): {
        "columns of other channels merged": "c[None, :] «* merging.PLANE→+ 0»",
        "a block's second share left out": "tl.cdiv(«tl.minimum(first + BLOCK_C, walk.C)→first + 1», COLUMNS)"},
    ("merging.py", "test_merging.py::test_streams_share_no_counters"): {
        "one stream's counters for all": "_kept(device, «driver.active.get_current_stream(device.index)→0», "},
    ("merging.py", "test_merging.py::test_a_captured_launch_has_counters_of_its_own"): {
        "captured with counters that others count with": "«torch.cuda.is_current_stream_capturing()→False»"},
    ("geometry.py", f"{VALUES} -k 'training and 40'"): {
        "M without the columns of a plane": "self.groups * self.positions« * self.plane→»"},
    ("geometry.py", MEMORY): {"mask without its ragged bytes": "outer * («-(-self.inner // 8)→self.inner // 8»)"},
    ("geometry.py", "test_functional.py::test_strides"): {
        "another layout taken for the input's": "return x if «matches→True» else"},
    ("geometry.py", "test_functional.py::test_output_and_gradients_keep_the_layout"): {
        "strided channels_last made contiguous": "x.«movedim(1, -1).contiguous().movedim(-1, 1→contiguous(»)"},
    ("geometry.py", CREATE_GRAPH): {"mask unpacked in another layout": "if «g.channels_last and g.plane == 1→False»:"},
    ("launch_table.py", "test_one_launch.py::test_ways_to_launch_may_not_change_between_forward_and_backward"): {
        "one launch by columns": "return «g.plane == 1 and →»("},
    ("launch_table.py", "test_one_launch.py::test_slices_follow_the_cache"): {
        "two slices taken for one": "// («2 * →»g.values * reread)"},
    ("direct.py", "test_direct.py::test_lazily_negated_tensors"): {
        "lazily negated memory taken as it is": "or «any(map(Tensor.is_neg, given))→False»"},
    ("direct.py", "test_direct.py::test_whoever_looks_on_is_shown_the_operators"): {
        "modes for functions not asked": "or «torch._C._len_torch_function_stack()→False»",
        "profiler not shown the operators": "or «torch._C._autograd._profiler_enabled()→False»"},
    ("plans.py", "test_plans.py -k alignment"): {
        "kernel kept for any alignment": "«low & 15→False» else None"},
    ("plans.py", "test_plans.py -k changed"): {
        "launch hooks not called": "found is None« or _is_observed(kernel)→»",
        "vectors' dtypes not in a plan's key": "kinds.append(«t.dtype→1»)"},
    ("plans.py", "test_plans.py -k given"): {
        "compile-time arguments given first": "None, None, None, «*given, *rest→*rest, *given»)"},
    ("direct.py", "test_functional.py::test_vectors_need_not_be_contiguous"): {
        "strided statistics not written back": "«buffer.copy_(new→new.copy_(buffer»)"},
    ("direct.py", "test_functional.py::test_running_statistics_change_between_forward_and_backward_is_an_error"): {
        "autograd not told of new statistics": "«torch.autograd.graph.increment_version(buffer)→pass»"},
    ("ops.py", OPCHECK): {
        "fake output in the input's dtype": "dtype=«promoted(x, residual)→x.dtype»), mask",
        "fake residual gradient in the input's dtype":
            "dtype = «residual_dtype if residual is None else residual→x».dtype"},
    ("direct.py", "test_functional.py::test_shared_running_statistics_are_updated_one_after_the_other"): {
        "shared statistics updated in one launch": "is not None and «_share_statistics(norm, residual_norm)→False»"},
    ("phases.py", "test_synchronised.py::test_phases -k torch"): {
        "plain M2 not centred": "_sum(«(value - _by_channel(mean, x))→value».square())",
        "plain rstd forgotten": "rest« * _by_channel(own[1], t)→»"},
    ("phases.py", ONE_PROCESS): {"plain fork's gradient lost": "dy« if dy_fork is None else dy + dy_fork→»"},
    ("synchronised.py", ONE_PROCESS): {
        "first eps for the second synchronised norm": "/ total + «n→every[0]».eps",
        "first momentum for the second synchronised norm": "means[i], «n→every[0]».momentum",
        "biased synchronised variance": "m2s[i] / «(total - 1)→total»",
        "synchronised mean of dz is its sum": "mask, stats, sums« / total→»,",
        "synchronised gradient of the second use lost": "dy, dy_fork = «dy_fork→None», None",
        "synchronised residual's gradient lost": "dx, dresidual« if dz is None else dz→»"},
    ("synchronised.py", "test_synchronised.py::test_a_group_without_values"): {
        "empty batches everywhere let through": "total.item() «==→<» 0"},
    ("synchronised.py", MERGE): {
        "merge of processes without the mean's correction": "«    mean = mean + ((means - mean) * shares).sum(0)\n→»",
        "merge of processes without their counts": "(m2s + «counts * →»(means",
        "merge of processes without their means": "counts * «(means - mean).square()→0»"},
    ("synchronised.py", PROCESSES): {"sums of one process": "«dist.all_reduce(sums, group=ctx.process_group)→pass»"},
    ("norms.py", "test_norms.py::test_training_then_eval"): {
        "counted twice": "counter.add_(«1→2»)",
        "cumulative average without this batch": "1.0 / «(float(counter) +→max(float(counter),» 1.0)"},
    ("norms.py", "test_norms.py::test_a_failed_call_changes_no_buffer"): {
        "counted before the checks": "    process_group = _process_group(norm)\n    «→_count(norm)\n    »check_call"},
    ("norms.py", "test_norms.py::test_tracking_switched_off_after_construction"): {
        "buffers used though not tracked": "if «norm.training and not norm.track_running_stats→False»:",
        "counted though not tracked": "not is_frozen_norm(norm)« and norm.track_running_stats→»"},
    ("norms.py", "test_norms.py::test_norms_in_two_modes"): {"two modes in one node": "return« same_mode and→»"},
    ("norms.py", "test_norms.py::test_hooks_see_what_they_would_see"): {
        "forward hook unseen": "module.«_forward_hooks\n        or module._forward_pre_hooks→_forward_pre_hooks»"},
    ("norms.py", f"{HOOKS}::test_pre_hooks_that_change_the_input"): {
        "forward-pre hook unseen": "«        or module._forward_pre_hooks\n→»"},
    ("norms.py", f"{HOOKS}::test_a_lone_backward_hook"): {
        "full backward hook unseen": "«        or module._backward_hooks\n→»",
        "full-backward-pre hook unseen": "«        or module._backward_pre_hooks\n→»"},
    ("norms.py", f"{HOOKS}::test_a_call_of_its_own"): {
        "module.compile unseen": "«        or module._compiled_call_impl is not None\n→»",
        "a class's own call unseen": "«        or type(module).__call__ is not nn.Module.__call__\n→»"},
    ("norms.py", "test_synchronised.py::test_conversion"): {
        "mode lost in conversion": '"num_batches_tracked"«, "training"→»)'},
    ("norms.py", PROCESSES): {
        "two process groups in one node": "«_process_group(norm) is _process_group(residual_norm)→True»"},
    ("norms.py", "test_norms.py::test_tail_of_one_norm_twice_takes_the_input_first"): {
        "a norm as its own second": "« or norm is residual_norm→»:"},
    ("dispatch.py", "test_functional.py::test_any_subset_of_gradients"): {
        "parameters' gradients not asked for":
            "«_any_wants_gradient(*differentiable)→input.requires_grad»"},
    ("dispatch.py", "test_fuse_training.py::test_torch_func"): {
        "torch.func not seen": "«torch._C._are_functorch_transforms_active() or →»"},
    ("dispatch.py", "test_fuse_training.py::test_forward_mode_derivatives"): {
        "forward mode not seen": "forward_ad._current_level >«=→» 0"},
    ("function.py", "test_sequential.py::test_only_one_half_has_a_gradient"): {
        "forked half's gradient lost": "dy, dy_fork = «dy_fork→None», None"},
    ("function.py", "test_sequential.py::test_second_derivative"): {
        "fork's gradient lost in second derivatives": "dy« if dy_fork is None else dy + dy_fork→», kept"},
    ("function.py", SECOND): {
        "no second derivatives": "«torch.is_grad_enabled() and not torch.compiler.is_compiling()→False»"},
    ("function.py", CREATE_GRAPH): {
        "first eps for the second norm's second derivatives":
            "batch_norm(cast(Tensor, second_x), second«→._replace(eps=norm.eps)»))",
        "infinite gradient times zero in second derivatives":
            "«torch.where(first, dy * slope, dy * other_slope if other_slope else 0)→dy * slope * first»"},
    ("reference.py", SECOND): {"second derivatives pass a closed ReLU": "«~(z <= 0)→z <= 0»"},
    ("reference.py", CREATE_GRAPH): {
        "NaN closed in second derivatives": "«~(z <= 0)→z > 0»",
        "gradient at zero in second derivatives": "«~(z <= 0)→z >= 0»"},
    ("arguments.py", "test_errors.py"): {
        "residual of another shape": "if residual.«shape != input.shape→numel() != input.numel()»",
        "second norm's vectors judged by the input": "_check_norm(«residual→input», residual_norm,",
        "second norm without statistics in evaluation": "residual_norm, «training→True», prefix",
        "running_mean alone": "is None) «!=→>» (",
        "float32 vectors of a float64 input": "in (torch.float16, torch.bfloat16«→, torch.float64»)",
        "one value per channel": "«input.numel() == input.shape[1] > 0→False»",
        "a vector's size": "if «tensor.numel() != channels→False»",
        "eps just below zero": "eps < «0→-1»:",
        "running_var that requires a gradient":
            'if «→name == "running_mean" and »tensor is not None and tensor.requires_grad'},
    ("backend.py", "test_backend.py::test_forcing_pytorch_gives_the_reference"): {
        "backend kept after the with block": "        «set_backend(before)→pass»"},
    ("backend.py", "test_backend.py::test_plain_cpu_takes_the_native_kernels"): {
        "no kernels on a plain CPU": 'x.is_cpu and «not →»_interpreted()'},
    ("blocks.py", "test_sequential.py::test_a_hook_inside_a_block_sees_the_whole_gradient"): {
        "hook inside a block sees half a gradient": "«any(map(is_watched, module.modules())→is_watched(module»)"},
    ("blocks.py", "test_sequential.py::test_other_modules_and_copies"): {
        "subclass's own forward not run": "« or type(module).forward is not ForkedBlock.forward→»"},
    ("blocks.py", "test_sequential.py::test_output_used_elsewhere"): {"wrong half handed on": "pair = y, «y→pair[1]»"},
    ("warming.py", "test_warming.py"): {
        "what was not launched left as it was": "if «len(self._missing) > before→False»",
        "no backward warmed up": "    if «leaves→()»:\n        torch",
        "no evaluation warmed up": "with torch.no_grad():\n            «_apart(model, inputs, named)→pass»"},
    ("launch_table.py", "test_launch_file.py"): {
        "as few programs where a fork halves the tile": "resident += 0 if «wide→True»",
        "as many programs in float64": "resident += 0 if «wide→False»"},
    ("ahead.py", "test_warming.py"): {
        "kernels of others not launched": "if «fn.module.rpartition(\".\")[0] != __package__→False»",
        "compiled one after the other": "ThreadPoolExecutor(«os.cpu_count()→1»)"},
}
# fmt: on
