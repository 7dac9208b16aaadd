"""Deliberate faults in what ``fuse_`` finds and makes, as in ``fault_list``."""

REASONS = "test_fuse_left.py::test_left_alone_with_the_reason"
FOLLOWS = "test_fuse_left.py::test_what_follows_is_left"
ACTS = "test_fuse_activations.py"
REPLACED = "test_fuse_replaced.py::test_replaced_after_fuse"
FUSE = "test_fuse.py"
FROZEN = "test_frozen_norms.py"
HOOKS = "test_fuse_hooks.py"
RECOMPUTATION, INTERACTIONS = "test_recomputation.py", "test_recomputation_interactions.py"

# fmt: off
CONVERSION_FAULTS: dict[tuple[str, str], dict[str, str]] = {
    ("calls.py", "test_fuse_left.py::test_two_functional_norms_that_differ"): {
        "two modes in one call": "« or other[5] != training→»",
        "broadcast addends in one call": "«other[0].shape != input.shape or →»"},
    ("calls.py", f"{FUSE}::test_addition_in_place_keeps_its_dtype"): {
        "sum in place in the wider dtype": "    if «kept is None→True»:\n"},
    ("calls.py", f"{FUSE}::test_every_way_to_write_an_addition -k broadcast"): {
        "broadcast residual in the kernels": "    if «residual.shape != input.shape→False»:\n        z = norm"},
    ("fuse.py", f"{HOOKS}::test_fuse_again_with_a_narrower_filter"): {
        "earlier fusion left": "    «unfuse_(model)\n    →»for"},
    ("fuse.py", f"{FUSE}::test_wrong_arguments_change_nothing"): {
        "compiled model fused": "«module._compiled_call_impl is not None→False»"},
    ("tracing.py", f"{REASONS} -k random"): {
        "random numbers taken for constants": "if «random.getstate() != state→False»",
        "tensors of no input let through": "if «→False and »not any(isinstance(value, fx.Proxy)"},
    ("tracing.py", f"{FUSE}::test_code_that_differs_in_training"): {"mode not traced": "«value = code.training→pass»"},
    ("tracing.py", f"{FUSE}::test_addition_in_place_keeps_its_dtype"): {
        "addition in place taken for another": 'getattr(operator, «f"i{_name}"→_name, operator.add»)'},
    ("tracing.py", "test_fuse_reads.py::test_a_list_changed_in_place"): {
        "list read by reference": "«copy.deepcopy(value)→value»"},
    ("tracing.py", "test_fuse_left.py::test_reads_of_objects_are_refused"): {
        "objects taken for constants": "if «not _is_constant(value)→False»"},
    ("tracing.py", f"{REASONS} -k assignment"): {
        "assignments let through":
            '«raise UntraceableError(f"it assigns {name}"→object.__setattr__(module, name, value»)'},
    ("tracing.py", REPLACED): {
        "children of containers not noted": "yield «Container(path, tuple(module._modules)→from (»)"},
    ("tracing.py", f"{HOOKS}::test_a_call_of_its_own"): {
        "a class's own call traced too": "if «kind.__call__ is not nn.Module.__call__→False»"},
    ("fused_forward.py", "test_fuse_reads.py::test_true_is_not_one"): {
        "True taken for 1": "if «type(found) is not type(value)→False»:",
        "[True] taken for [1]": "and («not isinstance(value, _CONTAINERS)→True» or repr(found)"},
    ("fused_forward.py", REPLACED): {
        "children not compared": "«tuple(container._modules) != names→False»",
        "classes not compared": "if «not is_still(module, kind)→False»",
        "norms not compared": "if «norm is None or not is_norm(norm) or is_watched(norm)→False»"},
    ("fused_forward.py", "test_fuse_replaced.py::test_replaced_by_what_keeps_its_input"): {
        "hooks on readers not looked for": "if «→False and »not all(is_still(self.module, reader) for"},
    ("fused_forward.py", f"{HOOKS}::test_a_forward_hook_sees_what_it_sees_in_eager -k block"): {
        "hooks on a block handed a pair not looked for": "not plan.paired« or is_watched(self.module)→»"},
    ("fused_forward.py", f"{HOOKS}::test_global_hooks"): {
        "global hooks not looked for": "return «_has_any_global_hook() or →»torch.jit"},
    ("fused_forward.py", f"{HOOKS}::test_a_hook_after_unpickling"): {
        "readers lost in pickling": "self.kinds, self.norms, «self.readers→()»,\n        )  # fmt",
        "kinds lost in pickling": "«self.kinds→()», self.norms, self.readers,\n        )  # fmt"},
    ("fused_forward.py", f"{HOOKS}::test_a_number_after_unpickling"): {
        "reads lost in pickling": "self.takes_pair, «self.reads→()»,"},
    ("signature.py", f"{FUSE}::test_arguments_with_defaults"): {
        "named arguments ignored": "«given.pop(self.names[i], self.defaults[i])→self.defaults[i]»"},
    ("fused_forward.py", "test_fuse_parallel.py::test_replicas_of_data_parallel"): {
        "replica computes with the original":
            "«FusedForward(replica, self.plans, self.places, self.refused, self.recomputed).put_on()→pass»"},
    ("fused_forward.py", f"{HOOKS}::test_a_hook_on_a_norm_that_reads_a_pair"): {
        "hooked norm reads half a gradient": "not is_norm(norm)« or is_watched(norm)→»"},
    ("sites.py", f"{FOLLOWS} -k twice"): {
        "norm used twice": "if not self._may_fuse(node)« or not {*uses(node)} <= users→»",
        "sum used twice": "if «not {*uses(source)} <= {*place.nodes}→False»",
        "norm called twice": 'node.op == "call_module" and «not is_called_once(self.graph, str(node.target))→False»'},
    ("sites.py", f"{FUSE}::test_filter"): {
        "norm that filter_fn refuses": "if «is_batch_norm(norm) and not self.allowed(norm)→False»"},
    ("reader.py", "test_fuse_left.py::test_an_identity_used_twice"): {
        "identity used twice": "and self.is_identity(node)« and len(node.users) == 1→»:"},
    ("nodes.py", "test_fuse_left.py::test_a_change_in_place_between_norm_addition_and_relu"): {
        "in place by argument": '« or bool(node.kwargs.get("inplace"))→»'},
    ("sites.py", "test_fuse_left.py::test_a_change_in_place_between_norm_addition_and_relu"): {
        "changed between addition and ReLU": "if «self.may_change(pair, addition, place.value, {*place.nodes})→False»",
        "changed between norm and ReLU":
            "if «self.may_change((source,), operand.norm, place.value, pattern) and not alone→False»"},
    ("sites.py", f"{FOLLOWS} -k place"): {
        "addition in place to what others hold":
            "if main is None« or (operands[0] is None and self.changes_others(addition))→»"},
    ("sites.py", "test_fuse_left.py::test_two_functional_norms_that_differ"): {
        "functional and module norm in one call": "«self._function(main) is not self._function(other)→False»"},
    ("sites.py", f"{FUSE}::test_addition_in_place_keeps_its_dtype"): {
        "dtype of a sum in place": 'return «"residual" if added.addition.args[0] is added.residual else "input"→None»'},
    ("reader.py", f"{FOLLOWS} -k scaled"): {"scaled addition": "len(node.args) != 2« or node.kwargs→»"},
    ("reader.py", f"{FOLLOWS} -k itself"): {"added to itself": "isinstance(b, fx.Node)« and a is not b→»"},
    ("effects.py", "test_fuse_replaced.py::test_replaced_by_what_lets_the_input_change"): {
        "known modules not noted": "«        self.relied_on.add(str(node.target))\n→»"},
    ("sites.py", f"{ACTS}::test_every_way_to_write_it"): {
        "every activation a ReLU": "residual_norm, «place.activation→IDENTITY», _kept(added), False)",
        "activations not named": 'f"{head}+{«place.activation.name→str()»}"'},
    ("sites.py", f"{ACTS}::test_inverted_residuals"): {
        "sums that nothing follows left": "for node in «self._all(self.addends)→[]»",
        "norms alone left": "for node in «self._all(self.is_norm_call)→[]»"},
    ("sites.py", f"{ACTS}::test_a_changed_attribute"): {
        "attributes not noted": "«values = attributes(module)→values = {}»"},
    ("reader.py", f"{ACTS} -k gate"): {
        "gate used twice": "self._activation(gate) == SIGMOID« and len(gate.users) == 1→»",
        "gate of something else": "if «gate.args[:1] == (x,) and →»self._activation(gate)",
        "gate in place": "return «None if changes_in_place(gate) else →»Applied(SILU"},
    ("reader.py", f"{ACTS}::test_a_hook_on_the_activation"): {
        "hook on an activation": "return computed(module) if is_plain_call(node)« and not is_watched(module)→» else"},
    ("activations.py", f"{ACTS}::test_what_is_none"): {
        "every limit that of ReLU6": 'Activation("relu6") if «(min_val, max_val) == (0, 6)→True»'},
    ("activations.py", f"{ACTS}::test_modules_of_timm"): {
        "clamp taken for ReLU6": "return lambda z, inplace=False: «None if inplace else →»Activation(name)"},
    ("drafting.py", f"{ACTS} -k ones_own"): {
        "own activations of two norms left":
            "or _is_leaf(module)«→ or not is_called_once(matcher.graph, str(node.target))»"},
    ("drafting.py", f"{FUSE}::test_flat_sequential"): {
        "identity of one's own left": 'self._computes_only(matcher, node, «"nothing"→"an activation"») and self'},
    ("checking.py", f"{ACTS}::test_on_plain_operators_a_norm_alone_is_not_fused"): {
        "norm alone told to run": 'noted = «self.plain if alone and backend_for(input) == "torch" else →»self.ran'},
    ("passes.py", "test_report.py::test_passes_of_every_form"): {
        "shortcut of a smooth one read once": "«1.0 if activation.slopes is None else →»2 * _MASK"},
    ("drafting.py", f"{FUSE}::test_code_that_differs_in_training"): {
        "code of one mode for both": "if «→True or »not any(draft.depends_on_mode"},
    ("planning.py", "test_fuse_reads.py::test_a_value_used_elsewhere_is_no_pair"): {
        "value used elsewhere handed on": "maker is not None and« len(call.args[1].users) == 1 and→»"},
    ("drafting.py", f"{HOOKS}::test_inlined_modules"): {
        "reads of inlined code not noted": "«draft.reads[moved[:2]] = moved→pass»",
        "class of inlined code not noted": "draft.«kinds[path] = Kind(path, type(module))\n        draft.→»inlined",
        "watched module inlined": "«is_watched(module) or →»_is_leaf(module)"},
    ("traces.py", "test_fuse_left.py::test_own_forward_of_an_instance_is_left"): {
        "own forward replaced": 'if «"forward" in module.__dict__→False» and not'},
    ("signature.py", "test_fuse_calls.py::test_each_value_of_an_argument_has_its_own_code"): {
        "values not told apart": 'return «repr(value)→""»'},
    ("tracing.py", "test_fuse_calls.py -k that_the_code"): {
        "changed list let through": "if «repr((args, kwargs)) != before→False»",
        "returned list copied": "if «not _containers_in((args, kwargs)).isdisjoint(_containers_in(result))→False»"},
    ("effects.py", "test_fuse_zoo.py::test_what_others_hold_is_left"): {
        "view taken for a tensor of its own": '_FRESH_METHODS = («→"view_as", »"add"',
        "tensor that is read taken for another": "apart = «changed not in read and →»all("},
    ("sites.py", "test_fuse_zoo.py::test_a_dropout_that_drops_is_left_in_training"): {
        "what a dropout drops not noted": "in skipped:\n            «self._take_for_granted(str(node.target))→pass»"},
    ("drafting.py", "test_fuse_zoo.py::test_no_forward_is_replaced_where_nothing_is_fused"): {
        "forward replaced in vain": "return bool(self.sites) or «self.hands_on→True»"},
    ("recomputation.py", f"{RECOMPUTATION}::test_a_step"): {
        "made with another's statistics":
            "_Output(y, sources, «function→next((o.function for o in self.outputs.values()), function)»)",
        "made without the shortcut that nobody keeps":
            "keeper(residual))\n    «→sources = [s for s in sources if s]\n    »if None"},
    ("recomputation.py", f"{RECOMPUTATION} -k shared"): {
        "freed by the first of its users": "handle.made = «made→None»",
        "not freed by its last user": "made, self.made = self.made, «None→self.made»"},
    ("recomputation.py", f"{INTERACTIONS} -k head"): {
        "sources freed with the graph of another":
            "self.sources = «sources→[weakref.proxy(s) for s in sources]»"},
    ("last_phase.py", f"{RECOMPUTATION}::test_forms"): {
        "made again with a ReLU": 'second, activation«→._replace(name="relu", negative_slope=0.0)»)'},
    ("last_phase.py", f"{INTERACTIONS} -k head"): {
        "parameters that an optimizer changes": "t.detach()«.clone()→»"},
    ("recomputation.py", f"{INTERACTIONS} -k in_place"): {
        "change in place not seen": "if «self.tensor._version != self.version→False»",
        "change of the output not seen": "«self.witness.check()→pass»",
        "output made again that was changed": "return «t._version == self.witness.version and →»"},
    ("recomputation.py", f"{RECOMPUTATION} -k views"): {
        "view taken for the whole": "return made[0]«.as_strided(*self.place)→»"},
    ("recomputation.py", f"{INTERACTIONS} -k hooks_of_others"): {
        "hooks of others put out of force": "if «_hooks() is not None or →»not torch"},
    ("drafting.py", f"{RECOMPUTATION}::test_a_step"): {
        "batches of a recomputed place counted twice":
            "with graph.inserting_after(site.output):\n        «→graph.node_copy(call)\n        »graph"},
    ("planning.py", f"{RECOMPUTATION} -k report"): {
        "report tells of no recomputation": "recomputed = «all(map(self.recomputed, norms))→False»"},
    ("saving.py", f"{RECOMPUTATION} -k bytes"): {
        "bytes that are kept told as saved": "return kept« - recomputed→»"},
    ("drafting.py", f"{RECOMPUTATION} -k test_concatenations"): {
        "concatenations kept": "for node in «self.concatenations if recomputed else→»"},
    ("recomputation.py", f"{RECOMPUTATION} -k test_concatenations"): {
        "parts of a concatenation that nobody keeps": " or «forward.keep_whole(t)→None»"},
    ("planning.py", f"{INTERACTIONS} -k cannot_be_traced"): {
        "the model's own call not seen":
            "«forwards.append(FusedForward(self.model, {}, (), *self._paths(self.model)))→pass»"},
    ("fused_forward.py", "test_fuse_calls.py::test_a_new_call_keeps_to_the_filter"): {
        "filter lost for new calls": "plans_of(self.module, call, «self.refused→frozenset()», self"},
    ("checking.py", "test_check.py"): {
        "check changes statistics": "module._buffers[name] = buffer«.copy_(value)→»",
        "check changes modes": "            module.training = «mode→True»",
        "norm told to run that did not": "if module is not None« and tensors is not None→»"},
    ("pairs.py", "test_fuse_reads.py::test_a_pair_is_not_changed_in_place"): {
        "pair changed in place": "return []« if user.args[0] is not node else None→»"},
    ("pairs.py", f"{HOOKS}::test_the_fused_chain_is_what_these_tests_take_it_for"): {
        "second half handed to nobody": "        «last.replace_input_with(x, shortcut)→pass»"},
    ("reasons.py", f"{FUSE}::test_filter"): {
        "filter's refusal not told": 'return "«filter_fn refuses it→»"',
        "fused norms told as left": "and« name not in done and→»"},
    ("frozen.py", f"{FROZEN}::test_tail"): {
        "frozen norm without eps": "0.0, «self.eps→0.0»)",
        "frozen norm in the dtype of its input": "if «self.promotes→False» else input.dtype",
        "buffers of another dtype as they are": "(v if «v.dtype in allowed→True» else"},
    ("frozen.py", f"{FROZEN}::test_what_is_broadcast"): {
        "frozen norm broadcast": "v.shape == input.shape[1:2]« and→ or»"},
    ("frozen.py", f"{FROZEN}::test_what_has_another_class"): {
        "any class of the module a frozen norm": "each.__name__ «==→!=» _NAME"},
    ("frozen_norms.py", f"{FROZEN}::test_code_that_is_nearly_one"): {
        "shift by another scale":
            "for mean, factor in «_commuted(shifted, _MUL) if factor is scale→[_operands(shifted, _MUL)]»]",
        "vectors along another axis": "if «is_one and tuple(shape) == _BY_CHANNEL→True» else"},
    ("norms.py", f"{FROZEN}::test_beside_a_batch_norm"): {
        "frozen norm with the batch's statistics": "if is_frozen_norm(norm):\n        return «False\n→True\n»"},
    ("dispatch.py", f"{FROZEN}::test_what_is_kept"): {
        "both kept that a frozen sum is made of": "if «needs_z→False» and not training"},
    ("report.py", f"{FUSE}::test_report_counts_norms"): {
        "places counted for norms": "_counted(len(self.«norms→fused») + len(self.left)"},
    ("report.py", f"{FUSE}::test_report_counts_pairs"): {
        "pairs not counted": "given = self.form, «self.forked→False», self.frozen"},
    ("report.py", f"{FUSE}::test_code_that_differs_in_training"): {
        "evaluation counted as training": "if «self.in_training→True» else 0.0"},
}
# fmt: on
