"""The module of each benchmark, for this project and its peers. Each module has `make(task) -> Work`."""

HERE = "retina_jax"
"""Name of this project's variant."""
PACKAGE = "benchmarks"
OURS = {
    **dict.fromkeys(("step", "forward", "detect", "compile"), f"{PACKAGE}.network"),
    **dict.fromkeys(("loss", "match", "nms"), f"{PACKAGE}.parts"),
    "input": f"{PACKAGE}.input",
    "evaluate": f"{PACKAGE}.scoring",
}
PEERS = {
    "torchvision": f"{PACKAGE}.peers.torchvision",
    "torchvision.compiled": f"{PACKAGE}.peers.torchvision_compiled",
    "kerashub": f"{PACKAGE}.peers.kerashub",
    "optax": f"{PACKAGE}.peers.optax",
    "pycocotools": f"{PACKAGE}.peers.pycocotools",
    "tf.data": f"{PACKAGE}.peers.tf_data",
    "pil": f"{PACKAGE}.peers.pil",
}
