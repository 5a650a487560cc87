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
    f"{_SPLIT}[classic-ToyEstimator]",
    f"{_LOADS}[classic-KerasEstimator]",
    f"{_STAGES}test_a_stage_whose_files_were_lost_or_changed_is_refused[connect]",
    "torch/test_model.py::test_a_loaded_model_scores_and_measures_equal_to_the_bit",
    "keras/test_fit.py::test_a_pipeline_saves_and_loads_with_equal_predictions",
    f"{_LOADS}[connect-TorchEstimator]",
    f"{_LOADS}[connect-ToyEstimator]",
    # On Connect a search by TrainValidationSplit, and what the other kind of session has saved.
    f"{_STAGES}test_cross_validation_finds_the_best_and_saves_loads_and_overwrites[connect]",
    f"{_STAGES}test_pipelines_score_equal_to_the_bit_in_a_fresh_process[connect]",
    # Other steps to be killed at.
    f"keras/test_resume.py::{_KILLED}[1-29]",
    f"keras/test_resume.py::{_KILLED}[0-30]",
    f"torch/test_resume.py::{_KILLED}[0-104]",
    f"keras/test_resume.py::{_KILLED}[0-17]",
    "failure/test_fit_failures.py::test_a_killed_process_changes_no_bit_of_the_result[rank 1]",
    "test_connect.py::test_a_rank_that_is_killed_does_not_end_the_fit",
    # What is kept for a restart is the same on every backend.
    f"keras/test_backend_fits.py::{_KILLED}_on_another_backend[jax]",
    f"keras/test_backend_fits.py::{_KILLED}_on_another_backend[torch]",
    "keras/test_native.py::test_a_killed_rank_is_named_by_the_other[1]",
    # Three ranks in place of two, and TensorFlow's own exchange once more.
    "keras/test_native.py::test_two_ranks_equal_one_process_and_each_other[3]",
    "keras/test_resume.py::test_the_frameworks_own_exchange_gives_the_same_weights",
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
    # Loaded once, as other models; a script, as the README's; a grid, as the searches; a seed, as Keras's.
    "keras/test_custom_objects.py::test_a_model_of_them_is_loaded_once_per_python_worker",
    "keras/test_model_kinds.py::test_a_model_can_be_given_as_a_function_of_a_script",
    "keras/test_tuning.py::test_a_grid_of_keras_models_gives_those_of_separate_fits",
    "test_estimator.py::test_shuffled_training_repeats_to_the_bit_with_the_same_seed",
    # With one fit at a time.
    "dataset/test_lease.py::test_cross_validation_writes_each_fold_once[alone-2]",
    # Blocks that the README has, too, or that are long searches: `tox -e docs`, as the notebooks.
    "test_pages.py::test_the_blocks_of_a_page_run[tuning]",
    "test_pages.py::test_the_blocks_of_a_page_run[quickstart]",
    "test_pages.py::test_the_blocks_of_a_page_run[images]",
    "test_pages.py::test_the_blocks_of_a_page_run[pytorch]",
    # Waiting, in messages as in shared memory.
    "gang/test_ring.py::test_a_rank_that_waits_is_not_taken_for_the_one_waited_for[frames]",
    "gang/test_ring.py::test_a_rank_that_says_it_will_be_long_is_waited_for[frames]",
    "gang/test_ring.py::test_all_ranks_learn_after_the_timeout_who_keeps_silent[frames-100]",
    "gang/test_ring.py::test_all_ranks_learn_after_the_timeout_who_keeps_silent[watched-100]",
)
