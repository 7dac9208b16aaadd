"""The faults of the kernels in C++, as those of fault_list.py."""

NATIVE = "test_native.py::test_values_of_many_elements"
NATIVE_PAST = "test_native.py::test_stores_past_the_caches"
NATIVE_THREADS = "test_native.py::test_same_bits_whatever_the_threads"
ACTIVATIONS = "test_native_activations.py::test_values_of_many_elements"
KINKS = "test_native_oracle.py -k kinks_nan"
SMOOTH = "test_native_activations.py::test_smooth_to_a_few_roundings"

# fmt: off
IN_CPP: dict[tuple[str, str], dict[str, str]] = {
    ("activated.h", KINKS): {
        "C++: a relu6 with a gradient from six on":
            "case kRelu6: return «both(passes(z), passes(all(A(6)) - z))→passes(z)»",
        "C++: a relu6 whose gradient is multiplied": "case kRelu6: return «keep(on, dy)→dy * keep(on, all(A(1)))»;",
        "C++: a hardswish with a gradient below its kink": "return «keep(passes(z + all(A(3))), →(»select("},
    ("smooth.h", KINKS): {
        "C++: infinite square times zero": "fma(«lesser(all(A(1e9)), z * z)→z * z», all("},
    ("gradient_loops.h", "test_native_oracle.py -k sums_end"): {
        "C++: gradient of what is outside": "dz = «only(some, dz)→dz»;"},
    ("activated.h", ACTIVATIONS): {
        "C++: an identity with a slope": "return «name() != kIdentity→true»;"},
    ("backward.cpp", "test_native_oracle.py -k 'test_values_of_activations and phases'"): {
        "C++: a sum with an input that was not kept": "[c] = «is_kept ? →»static_cast<A>(sums[row])« : A(0)→»;"},
    ("backward.cpp", NATIVE): {
        "C++: the sign of a slope": "static_cast<A>(«-→»scale * rstd(i, c) * mean_dz_x)"},
    ("columns.h", NATIVE): {
        "C++: bits of a plane not moved to its first": "word = word «>> at % 8 →»& ("},
    ("forward.cpp", NATIVE): {
        "C++: biased running variance": "m2 / «(values - 1)→values», n.momentum",
        "C++: second norm's statistics from the input": "block, Elements(i == 0 ? call_.x : «call_.residual→call_.x»)"},
    ("forward.cpp", NATIVE_PAST): {
        "C++: stores past the caches off a line": "past = past_« && y.aligned()→»;"},
    ("gradient_loops.h", ACTIVATIONS): {
        "C++: dz not written where it waits": "add_up(i, some, found);\n      if («out.dz→false») out.dz.store",
        "C++: a residual of a smooth activation forgotten": "if («in.residual→false») z = z + in.residual.load("},
    ("partition.h", NATIVE_THREADS): {
        "C++: parts by the threads":
            "const Machine&«→ machine», int64_t element_bytes)\n      : channels_(a.channels), rows_(a.values()), "
            "mask_row_(divide_up(a.channels, 8)) {\n    // Enough parts for many threads, of enough rows to be worth a "
            "merge, short enough for the sums' precision.\n    int64_t parts = «1→machine.threads»;"},
    ("smooth.h", SMOOTH): {
        "C++: ln 2 without its second part": "fma(n, all(«-2.12194440e-4f→0.f»),",
        "C++: an exponential that never vanishes": "lesser(all(«105→87»",
        "C++: a gelu without its last coefficient": "«5.45127514e-05f→0.f»}"},
    ("statistics.h", NATIVE): {
        "C++: columns beyond a short row": "«Typed<A>(sums).store(i, n, load(sums + i) + found.sum, false)→"
            "store(sums + i, load(sums + i) + found.sum)»;",
        "C++: squares between parts": "m2s[c]) + values * deviation * «deviation→0»;"},
    ("vectors.h", NATIVE): {
        "C++: half of a mask's bytes": "std::memcpy(mask + i / 8, &bits, Pack<A>::lanes / «8→16»);"},
}
