"""What goes in and what comes out of each step: one KFP component a file.

A component declares typed ports and calls one library function through `vlmflow.step.open_step`; the work is in
`vlmflow`. Bodies are self-contained (KFP ships their source), so every import sits inside the function. All use the
project image with kfp installed in it (`install_kfp_package=False`), the only style that runs unchanged on a cluster,
in containers and as local subprocesses. `vlmflow compile --image` puts a released image in the place of `IMAGE`.
"""

IMAGE = "vlmflow:0.1.0"
