"""Side-by-side measurements: how to time on a power-capped GPU, what to compare, and how to write it down.

    suite.py     what a suite is; options.py: options that several commands share
    suites/      a command of ``supersonic-moe bench`` each: its options, its cases, what it prints, writes and draws
    layer.py  gemm.py  kernels.py  breakdown.py  precision.py  cold_start.py and first_call.py    measured
    train.py  infer.py  ep.py  mega.py  mega_ranks.py  transformers.py                            measured, too
    exchange.py  exchange_ranks.py  exchange_beside.py  exchange_kernel.py                        measured, too
    ranks.py                                                                                      several ranks at once
    timing.py  spans.py  sensor.py                                                                clocks and sensors
    peers.py  layer_peers.py  gemm_bf16.py  gemm_fp8.py                                           who takes part
    infer_peers.py  infer_triton.py  infer_parts.py                                               likewise
    infer_glue.py                                                                                 around peers' products
    shapes.py  infer_cases.py  mega_cases.py                                                      which sizes
    report.py  bar_chart.py  kernel_figure.py  infer_figure.py  mega_figure.py                    tables, files, figures
    ep_timeline.py  mega_timeline.py                                                              likewise, over time
    readme.py  mega_page.py  markdown.py                                                          tables of the docs
    check.py                                                                                      new files against old

To add a suite:

1. Measure a case in a file of this folder: a function from a case to a :class:`~.report.CaseResult`, which holds the
   metrics of each contender by the names of ``report.METRICS``; add those that are new. Raise
   :class:`~.timing.NoResultError` where we have no result ourselves, and let :func:`~.timing.measure` take the time.
2. Say in a file of ``suites/`` how that becomes a command: a frozen dataclass that is a :class:`~.suite.Suite`. Its
   docstring is the help, its fields are the options, ``cases`` lists what to measure and ``run`` measures one;
   ``around``, ``metrics``, ``columns``, ``summary`` and ``figure`` are there to be replaced. No import of torch at
   the top, please: ``--help`` would wait for it.
3. Append the class to ``suites.SUITES``. That makes ``supersonic-moe bench NAME``, and ``bench all`` runs it too, once
   for each of its ``files``.
4. Say in ``readme.py`` what the README shows of its files, if anything.
"""
