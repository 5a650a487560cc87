"""Tests that take long and go a way that others go as well: `tox -e extended` runs them, `tox` leaves them out.

What else shows the same stands behind each.
"""

_STAGES = "contract/test_stages.py::"
_SPLIT = f"{_STAGES}test_a_train_validation_split_finds_the_best_and_saves_loads_and_overwrites"
_LOADS = f"{_STAGES}test_a_model_loads_as_it_was_saved_and_scores_alike"
_KILLED = "test_a_rank_that_is_killed_changes_no_bit"

EXTENDED = (
    # Each stage on one kind of session at least, and Keras's in everything else on both.
    f"{_SPLIT}[classic-KerasEstimator]",
    f"{_SPLIT}[connect-TorchEstimator]",
    f"{_SPLIT}[connect-ToyEstimator]",
    f"{_LOADS}[connect-TorchEstimator]",
    f"{_LOADS}[connect-ToyEstimator]",
    # On Connect a search by TrainValidationSplit, and what the other kind of session has saved.
    f"{_STAGES}test_cross_validation_finds_the_best_and_saves_loads_and_overwrites[connect]",
    f"{_STAGES}test_pipelines_score_equal_to_the_bit_in_a_fresh_process[connect]",
    # Other steps to be killed at.
    f"keras/test_resume.py::{_KILLED}[1-29]",
    f"keras/test_resume.py::{_KILLED}[0-30]",
    f"torch/test_resume.py::{_KILLED}[0-104]",
    f"keras/test_backend_fits.py::{_KILLED}_on_another_backend[torch]",
    "keras/test_native.py::test_a_killed_rank_is_named_by_the_other[1]",
    # Cut along the other axis.
    "keras/test_backend_fits.py::test_a_model_that_is_cut_over_two_workers_equals_one_that_is_not[mesh1]",
    # Processes of a cluster, with executors that are killed: failure/test_fit_failures.py.
    "keras/test_fit.py::test_a_pipeline_on_a_cluster_of_processes",
    "test_standalone.py::test_a_fit_on_two_machines_workers_is_that_of_local_tasks",
    # Ranks that are killed while the others wait.
    "failure/test_gang_failures.py::test_a_kill_in_mid_flight_ends_the_gang[task-meets]",
    "failure/test_gang_failures.py::test_a_kill_in_mid_flight_ends_the_gang[child-meets]",
    # A pipeline of one model of one's own classes, and binary classifiers with Spark's evaluators.
    "keras/test_custom_objects.py::test_pipelines_of_several_models_of_them",
    "keras/test_evaluators.py::test_one_vs_rest",
    # With one fit at a time.
    "dataset/test_lease.py::test_cross_validation_writes_each_fold_once[alone-2]",
    # Blocks that the README has, too, or that are long searches: `tox -e docs`, as the notebooks.
    "test_pages.py::test_the_blocks_of_a_page_run[tuning]",
    "test_pages.py::test_the_blocks_of_a_page_run[quickstart]",
    "test_pages.py::test_the_blocks_of_a_page_run[images]",
)
