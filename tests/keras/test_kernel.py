"""Python functions as operations of TensorFlow's graph."""

import gc
import itertools
import threading

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from spark_nn.keras import kernel
from spark_nn.keras.kernel import Mapped

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["kernel", "numpy_function"], autouse=True)
def interface(request, monkeypatch):
    """Every test runs with TensorFlow's interface for kernels, and as where there is none."""
    if request.param == "numpy_function":
        monkeypatch.setattr(kernel, "_kernels", lambda: None)
    else:
        assert kernel._kernels() is not None
    return request.param


def mapping(work):
    return Mapped(lambda dtype, sizes: work)


def tenfold(given, filled):
    for source, to in zip(given, filled, strict=True):
        assert source.ndim == to.ndim == 1
        np.multiply(source, 10, out=to)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eager", [False, True])
def test_each_tensor_is_mapped_to_one_of_its_shape(dtype, eager):
    tensors = [
        tf.constant(np.random.default_rng(0).random(shape), dtype) for shape in [(), (0, 3), (4, 5), (2, 3, 4), (1000,)]
    ]
    mapped = mapping(tenfold)
    function = (lambda *given: mapped([each + 1 for each in given])) if eager else None
    function = function or tf.function(lambda *given: mapped([each + 1 for each in given]))
    results = function(*tensors)
    for result, tensor in zip(results, tensors, strict=True):
        assert result.dtype == tensor.dtype
        assert_array_equal(result, (tensor.numpy() + 1) * 10)


def test_the_work_is_prepared_for_what_it_will_get(interface):
    prepared = []

    def prepare(dtype, sizes):
        prepared.append((dtype, sizes))
        return tenfold

    mapped = Mapped(prepare)
    function = tf.function(lambda x, y: mapped([x + 1, y]))
    for _ in range(3):
        function(tf.ones((2, 3), tf.float64), tf.ones((), tf.float64))
    assert prepared == [(np.float64, (6, 1))] * (1 if interface == "kernel" else 3)


def test_an_input_that_others_read_keeps_its_value():
    mapped = mapping(tenfold)

    @tf.function
    def function(x):
        y = x + 1
        (z,) = mapped([y])
        return x, y, z, y + z

    x = tf.random.uniform((300,))
    for _ in range(3):
        x_after, y, z, total = function(x)
        assert_array_equal(x_after, x)
        assert_array_equal(y, x + 1)
        assert_array_equal(z, (x + 1) * 10)
        assert_array_equal(total, (x + 1) + (x + 1) * 10)


def test_a_variable_given_as_it_is_keeps_its_value():
    mapped, variable = mapping(tenfold), tf.Variable([1.0, 2.0])
    assert_array_equal(tf.function(lambda: mapped([variable.value()]))()[0], [10, 20])
    assert_array_equal(variable, [1, 2])


def test_the_memory_of_the_input_is_filled_where_nobody_needs_it_any_more(interface):
    same = []

    def look(given, filled):
        same.append(np.shares_memory(given[0], filled[0]))
        np.copyto(filled[0], given[0])

    mapped = mapping(look)
    function = tf.function(lambda x: mapped([x + 1])[0] * 2)
    assert_array_equal(function(tf.ones(1000)), np.full(1000, 4))
    assert same == [interface == "kernel"]


def test_it_runs_at_every_step_of_a_loop_and_in_order():
    calls = []

    def count(given, filled):
        calls.append(float(given[0][0]))
        filled[0][:] = given[0] + 1

    mapped = mapping(count)

    @tf.function
    def function():
        mapped([tf.constant([-1.0])])  # whose result nobody takes
        mapped([tf.constant([-1.0])])  # the same again
        return tf.while_loop(lambda i, _: i < 5, lambda i, x: (i + 1, mapped([x])[0]), (0, tf.constant([0.0])))[1]

    for _ in range(2):
        assert_array_equal(function(), [5])
    assert calls == [-1, -1, 0, 1, 2, 3, 4] * 2


def test_shapes_that_only_the_step_knows_are_mapped_as_well():
    mapped = mapping(tenfold)
    function = tf.function(lambda x: mapped([x])[0], input_signature=[tf.TensorSpec([None, 2])])
    for rows in (3, 0, 1):
        assert_array_equal(function(tf.ones((rows, 2))), np.full((rows, 2), 10))


def test_what_the_function_raises_ends_the_step_and_no_later_one():
    def fail(given, filled):
        if given[0][0] < 0:
            raise ArithmeticError("below zero")
        tenfold(given, filled)

    mapped = mapping(fail)
    function = tf.function(lambda x: mapped([x]))
    for _ in range(3):
        with pytest.raises(tf.errors.OpError, match="(?s)in fail.*ArithmeticError: below zero"):
            function(tf.constant([-1.0]))
        assert_array_equal(function(tf.constant([2.0]))[0], [20])


def test_threads_run_it_at_the_same_time():
    mapped = mapping(tenfold)
    function = tf.function(lambda x: mapped([x * 2])[0])
    function(tf.zeros(100))
    wrong = []

    def work(number):
        for step in range(200):
            value = float(number * 1000 + step)
            if not (function(tf.fill([100], value)).numpy() == value * 20).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_neither_tensors_nor_threads_leave_anything_behind():
    mapped = mapping(tenfold)
    function = tf.function(lambda x: mapped([x + 1, x])[0])
    x = tf.zeros(250_000)
    sizes = []
    for step in itertools.count():
        function(x)
        if step % 500 == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                sizes.append(int(file.read().split()[1]) * 4096 / 1e6)
        if step == 2000:
            break
    assert sizes[-1] - sizes[1] < 10  # one tensor a step would be 2,000 MB


def test_a_graph_that_outlives_its_function_says_so(interface):
    if interface == "numpy_function":
        pytest.skip("there, TensorFlow keeps the function")
    mapped = mapping(tenfold)
    graph = tf.Graph()
    with graph.as_default():
        (result,) = mapped([tf.constant([1.0])])
    del mapped
    gc.collect()
    with (
        tf.compat.v1.Session(graph=graph) as session,
        pytest.raises(tf.errors.UnknownError, match="trace the step again"),
    ):
        session.run(result)


def test_an_error_is_told_whatever_its_text_is_made_of(interface):
    if interface == "numpy_function":
        pytest.skip("there, TensorFlow fails to tell it, and leaves the thread with an exception")

    def fail(given, filled):
        raise OSError("cannot read b\udcff.dat")

    mapped = mapping(fail)
    with pytest.raises(tf.errors.OpError, match="cannot read b"):
        tf.function(lambda x: mapped([x]))(tf.ones(3))


def test_a_shape_that_is_not_so_is_an_error_and_no_look_into_other_memory(interface):
    if interface == "numpy_function":
        pytest.skip("there, TensorFlow hands over what is there")
    mapped = mapping(tenfold)

    @tf.function
    def function(x):
        y = tf.unique(x)[0]
        y.set_shape([1_000_000])
        return mapped([y])

    with pytest.raises(tf.errors.OpError, match="8 bytes, and the graph says 4000000.*set_shape"):
        function(tf.constant([1.0, 2.0, 1.0]))


def test_a_second_copy_of_the_module_registers_its_own(interface):
    if interface == "numpy_function":
        pytest.skip("there, nothing is registered")
    first, second = kernel._kernels(), kernel._kernels.__wrapped__()
    assert first._op != second._op


def test_a_tensorflow_without_the_interface_is_made_do_with(monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setitem(kernel._CALLS, "TF_NoSuchFunction", (None,))
    with caplog.at_level("INFO", logger=kernel.__name__):
        assert kernel._kernels.__wrapped__() is None
    assert "TF_NoSuchFunction" in caplog.text
