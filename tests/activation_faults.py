"""Deliberate faults in what the kernels know of activations, as in ``fault_list``."""

KINK = "test_accuracy.py::test_no_gradient_at_exact_zero"
NAN = "test_accuracy.py::test_nan_and_inf_stand_where_eager_has_them"
POINTS = "test_activations.py::test_kinks_nan_and_infinity"
VALUES = "test_activations.py::test_values_of_activations"
CHANGED = "test_plans.py -k changed"

# fmt: off
ACTIVATION_FAULTS: dict[tuple[str, str], dict[str, str]] = {
    ("gpu/activation.py", KINK): {"gradient at zero": "return ~(z <«=→» 0)\n"},
    ("gpu/activation.py", NAN): {
        "NaN becomes zero": "return tl.where(«z <= 0, 0, z→z > 0, z, 0»)\n",
        "no gradient at NaN": "return «~(z <= 0)→z > 0»\n"},
    ("gpu/activation.py", "test_accuracy.py::test_nan_gradient_is_stopped_by_a_closed_relu"): {
        "infinite gradient times zero": "else:\n        return «tl.where(first, dy, 0→dy * (first»)"},
    ("gpu/activation.py", POINTS): {
        "gradient at six": "| (z >«=→» 6))",
        "gradient at minus three": "tl.where(z <«=→» -3, 0, tl.where((z > -3)",
        "open ends of hardsigmoid": "return (z >«→=» -3) & (z < 3)",
        "infinite square times zero": "«tl.minimum(z * z, 1e9)→(z * z)»",
        "leaky slope lost in the gradient": "tl.where(first, dy, dy« * activation.negative_slope→»)"},
    ("gpu/activation.py", VALUES): {
        "derivative of silu": "(1 «+→-» z * (1 - s))",
        "slope of hardsigmoid's bits": "tl.where(first, dy« * (1 / 6)→», 0)",
        "density of gelu": "_DENSITY = tl.constexpr(0.39«89→98»",
        "cube of gelu_tanh": "_A + «3 * →»_B * tl.minimum"},
    ("gpu/activation.py", "test_activations.py::test_sums_end_where_the_activation_ends"): {
        "gradient of what is outside": "tl.where(«inside→True», _smooth"},
    ("normalise.py", "test_functional.py::test_values -k add+relu"): {
        "mask inverted": "pack_bits(«→~»takes_first_slope"},
    ("reduce.py", VALUES): {
        "residual without a norm normed": "return «residual if norm.mean is None else→» affine(residual",
        "residual without a norm forgotten": "return «→0 * »residual if norm.mean is None"},
    ("apply.py", VALUES): {"shortcut forgotten before the derivative": "z += «→0 * »shortcut(residual, other)"},
    ("launching.py", "test_activations.py::test_dtypes_of_what_is_not_kept"): {
        "gradient of what is not kept in dy's dtype": "«x_dtype→dy.dtype» if x is None else x.dtype"},
    ("launching.py", CHANGED): {
        "activation not in a forward's key": "norm.eps, eps, «activation→None», *rest)",
        "activation not in a backward's key": "x is None, dtypes, «activation→None»",
        "missing x not in a plan's key": "norm.eps, eps, «x is None→None», dtypes",
        "dtype of a missing x not in a plan's key": "x is None, «dtypes→dtypes[1]», activation"},
}
# fmt: on
