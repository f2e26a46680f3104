"""A mesh of devices, and the processes that share one.

What each function does without a mesh, or with one process:

    layout.py     make_inference_mesh(None), current_mesh, shardings                     None
                  sharded_shapes, inference_shapes                                       shapes on no mesh; on the first device
                  init_sharded(begin, ...), make_sharded_cache(make)                     call it
                  place, global_batch, pin, pin_cache, shard_rows, spread_rows,
                  shard_columns, replicate, regather                                     return the argument as it is
                  look_up(f, ...), attend_by_head(kernel, ...), map_whole_matrices(f, )  call f on the arrays as they are
                  row_shards, column_shards, spread_shards; batch_share                  1; (1, 0)
                  split_* and join_*, cut_rows and join_cuts, stack_rows                 slice, concatenate, reshape
    processes.py  is_first, process_count, machine_count                                 True, 1, 1
                  gather_strings, gather_numbers                                         a list of the own value
                  refuse_*, process_0_first, end, end_for_error                          do nothing

`shape.py` (axes and sizes) and `rules.py` (which axis cuts what) compute on plain values.
"""
