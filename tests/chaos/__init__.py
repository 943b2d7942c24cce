"""Faults, and what must hold whatever they were (invariants.py). Which test holds which fault:

 1 a train worker is killed             ray_jobs/test_train.py killed_worker; test_processes.py a_group_that_loses
 2 a trial's actor is killed            test_processes.py an_actor_that_is_killed
 3 Train's controller is killed         test_processes.py a_group_that_loses; its cleaner, too: what_a_group_held
 4 the driver is killed                 ray_jobs/test_sweep.py a_stopped_sweep; on a cluster: test_head.py
 5 the head is killed                   test_head.py
 6 a node is killed                     test_nodes.py a_node_that_is_killed
 7 a node is drained, SIGTERM           test_nodes.py a_drained_node; test_processes.py sigterm
 8 a node is added                      test_nodes.py a_node_that_comes
 9 from no nodes up and back            ray_jobs/test_autoscale.py; end of test_nodes.py
10 many groups end one after the other  ray_jobs/test_sweep.py twenty_rungs
11 damaged shards                       events/test_shards.py truncated, altered, missing; events/test_verified.py
12 damaged checkpoints                  training/test_checkpoint.py; training/test_rung.py damaged_checkpoint_inside
13 checkpoints of another run, version  training/test_checkpoint.py another_run, another_version
14 NaN, on one rank, at one trial       training/test_loop.py non_finite, test_rung.py divergence, test_zero.py
15 out of memory                        training/test_rung.py out_of_memory, a_group_that_ran_out; sweep/test_memory.py
16 full disk, storage that refuses      test_files.py; training/test_journal.py; sweep/test_breaker.py;
                                        ray_jobs/test_trial.py, test_search.py a_full_disk
17 a process stands still               test_processes.py an_actor_that_stands_still; ray_jobs/test_pulse.py
18 a name that is there already         ray_jobs/test_sweep.py resume_must_and_never
19 malformed YAML                       test_yaml.py
20 wrong keys and values                sweep/test_spec.py a_slip_is_one_line
21 a space without a point              sweep/test_space.py; sweep/test_plan.py
22 tasks that end together at the cap   sweep/test_driver.py and policies/test_frontier.py over cap_machine.py
23 late, repeated, missing reports      cap_machine.py late; ray_jobs/test_search.py
24 SIGINT, SIGTERM, ray job stop        ray_jobs/test_sweep.py a_stopped_sweep; ray_jobs/test_search.py a_stopped_sweep;
                                        test_head.py a_signal_to_a_driver
25 clocks, locale, odd and long paths   test_environment.py; sweep/test_lease.py; test_head.py (a time zone)
26 no dashboard, a foreign cluster      test_cli.py doctor; ray_jobs/test_train.py; ray_jobs/test_sweep.py an_address
   versions that differ                 test_environment.py a_cluster_of_another_version
27 TensorBoard cannot be written        doors/test_tensorboard.py
28 two sweeps in one folder             sweep/test_lease.py; sweep/test_ledger.py of_twenty_drivers
29 another number of workers            training/test_zero.py row_of_two_workers, plain_to_zero
30 600 trials with losses everywhere    test_invariants.py
"""
