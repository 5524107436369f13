"""All options of an experiment, as frozen dataclasses.

A config file (`configs/*.py`) is a Python file, which is executed, with a function `get_config() -> Config`. Every field can
be overridden on the command line by its dotted name (`--loss.gamma 5 --data.batch-size 16`). Defaults are the paper's
(RetinaNet-50-600, Table 1) and, where the paper is silent, those of its authors' code (Detectron).

`option` holds what is known about a field besides its type; `config_io` reads it, and has the rules between fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from retina_jax.errors import PlainError


class ConfigError(PlainError, ValueError):
    """An invalid option or config; the message is one line that names the field and what would be valid."""


@dataclass(frozen=True)
class Option:
    """What is known about a config field besides its type, default and docstring."""

    bounds: str = ""
    """Valid numbers, such as ">= 0, < 1"; for a tuple, of its elements."""
    unit: str = ""
    resume: bool = False
    """A resumed run may change it, because it does not change what a training step computes."""
    outcome: bool | Literal["file name"] = True
    """Whether it changes a run's result and digest; "file name": only the name of the file does. False implies `resume`."""
    per_host: bool = False
    """Whether it may differ between the hosts of a run."""
    basic: bool = False
    """Whether `--help` lists it; `--help-all` lists every field."""
    first_default: Any = None
    """The field's first default, if it has changed since: digests are relative to it."""


def option(default: Any, bounds: str = "", **known: Any) -> Any:
    """Returns a dataclass field with a default; `known` are fields of `Option`."""
    return field(default=default, metadata={"option": Option(bounds, **known)})


@dataclass(frozen=True)
class ScenesConfig:
    """Generated scenes (`data.source scenes`), written once as JPEG files and COCO JSON files."""

    folder: str = option("data/scenes", outcome=False, per_host=True)
    """Folder for the scenes; each setting has its own sub-folder, which is reused if it exists."""
    train_images: int = option(3000, ">= 1")
    """Images in the training split."""
    val_images: int = option(400, ">= 1")
    """Images in the validation split, drawn from other seeds than the training split."""
    size: int = option(128, ">= 32, <= 4096", unit="px")
    """Side of the square images."""
    classes: int = option(6, ">= 2, <= 12")
    """Object classes; each is one shape in one hue."""
    max_objects: int = option(5, ">= 0")
    """Maximum number of objects in an image; each image has 0 to this many."""
    min_side: float = option(8.0, ">= 4", unit="px")
    """Smallest object, square root of the box area."""
    max_side: float = option(56.0, ">= 4", unit="px")
    """Largest object, square root of the box area; at most 0.75 size."""
    lookalikes: int = option(4, ">= 0")
    """Maximum number of distractors per image: the right shape in a wrong hue or the right hue in a wrong shape."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass(frozen=True)
class DataConfig:
    """Data sets and preprocessing."""

    source: Literal["coco", "tfds", "scenes"] = "coco"
    """coco: a COCO-format JSON and an image folder; tfds: a TensorFlow dataset with COCO's features; scenes: generated."""
    train_annotations: str = option("", resume=True, outcome="file name", per_host=True, basic=True)
    """COCO JSON of the training images (source coco). Paper: trainval35k, which is instances_train2017.json."""
    train_images: str = option("", outcome=False, per_host=True, basic=True)
    """Folder of the training images (source coco)."""
    val_annotations: str = option("", resume=True, outcome="file name", per_host=True, basic=True)
    """COCO JSON of the evaluation images. Paper: minival, instances_val2017.json. Empty: the boxes in TFDS (source tfds)."""
    val_images: str = option("", outcome=False, per_host=True, basic=True)
    """Folder of the evaluation images (source coco)."""
    tfds_name: str = "coco/2017"
    """Name of the TensorFlow dataset (source tfds), or the folder of a prepared dataset."""
    tfds_folder: str = option("", outcome=False, per_host=True)
    """TFDS data_dir; empty: TFDS's default."""
    tfds_train_split: str = "train"
    """TFDS split for training."""
    tfds_val_split: str = option("validation", resume=True)
    """TFDS split for evaluation."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """Generated scenes (source scenes)."""
    batch_size: int = option(16, ">= 1", unit="images", basic=True)
    """Images per training step, over all devices and hosts. Paper: 16 (2 on each of 8 GPUs)."""
    short_side: int = option(600, ">= 1", unit="px", basic=True)
    """Length that the shorter image side is resized to. Paper: 600 for the ablations, 400 to 800 in Table 1e."""
    long_side: int = option(1000, ">= 1", unit="px", basic=True)
    """Largest length of the longer side after the resize. Detectron: 1000 with 600, 1333 with 800; not in the paper."""
    jitter_short_sides: tuple[int, ...] = option((), ">= 1", unit="px")
    """Short sides of multi-scale training (scale jitter, Table 2), drawn for each image and epoch with equal probability;
    empty: short_side only, as evaluation uses. The largest decides the padded shapes, and so the cost of every step."""
    scale_jitter: tuple[float, float] | None = option(None, "> 0, <= 8")
    """Smallest and largest factor of the resized size in training, drawn for each image and epoch uniformly, such as 0.8 1.2
    (TF Model Garden) or 0.1 2 (detectron2's large-scale jitter): a random crop of an image larger than its padded shape,
    padding of a smaller one. Boxes are clipped to the crop; those with nothing inside are dropped. Paper: none."""
    colour_jitter: float = option(0.0, ">= 0, <= 1")
    """Largest change of brightness, contrast and saturation in training, as a fraction; the hue turns by up to a quarter of
    it, in full turns. Drawn for each image and epoch. Paper: 0."""
    flip: bool = True
    """Flip half of the training images left to right. Paper: the only augmentation."""
    resize: Literal["bilinear", "antialias", "pillow"] = "bilinear"
    """bilinear: without antialiasing (cv2, Detectron, torchvision); antialias: with it; pillow: with it, bit-exact with
    Pillow, which has integer weights and rounds twice (detectron2). pillow needs data.pixels uint8."""
    resize_rule: Literal["fit", "stretch"] = "fit"
    """fit: keeps the aspect ratio, within short_side and long_side; stretch: both sides become short_side (MLPerf: 800),
    which needs long_side to be the same."""
    size_rounding: Literal["nearest", "floor"] = "nearest"
    """Rounding of a resized image's sides: nearest (Detectron, detectron2) or floor (torchvision)."""
    pixels: Literal["uint8", "float32"] = "uint8"
    """Pixels after the resize: rounded to uint8 (PIL, detectron2), or float32, 4 times larger (Detectron, torchvision)."""
    box_ends: Literal["half_open", "inclusive"] = "half_open"
    """How the right and lower ends of boxes are resized: as edges, x2 s; or as last pixels, (x2 - 1) s + 1 (Detectron)."""
    buckets: Literal[0, 1, 2, 4, 6] = option(6, first_default=4)
    """Padded shapes of the images, each compiled once: 6 = 2 orientations x 3 long sides, 4 = 2 x 2 (5 % more pixels on
    COCO than 6), 2 = orientations, 1 = one square. 0: training uses 4; detection and evaluation pad each batch to its
    largest image (torchvision, detectron2, Detectron)."""
    pad_multiple: int = option(32, ">= 32", unit="px")
    """Sides of padded shapes are multiples of this, which is itself a multiple of 32."""
    box_format: Literal["auto", "xywh", "xyxy", "cxcywh", "xywh_fractions", "xyxy_fractions", "cxcywh_fractions"] = (
        option("auto", resume=True)
    )
    """Numbers of a bbox (source coco): xywh, COCO's corner and size in pixels; xyxy, two corners; cxcywh, centre and size;
    or fractions of the image's sides. auto: xywh, refused if the boxes look like another format."""
    crowds: Literal["ignore", "objects"] = option("ignore", resume=True)
    """Annotations with iscrowd 1 (source coco): ignore (COCO), or objects, for tools that set iscrowd on every mask."""
    tile: int = option(0, ">= 0", unit="px")
    """Side of the overlapping square tiles that images are cut into, in training, evaluation and detection, for large
    images with small objects; each tile is resized like an image. 0: images are not cut. docs/own_data.md has the rules."""
    tile_overlap: float = option(0.25, ">= 0, <= 0.9")
    """Smallest overlap of neighbouring tiles as a fraction of data.tile; it should hold the largest object."""
    max_boxes: int | Literal["auto"] = option(100, ">= 1")
    """Maximum number of ground-truth boxes per image (or tile); the others are dropped and counted. COCO's maximum is 93.
    auto: the largest number in the training data, rounded up to a multiple of 8; training writes it to the run's config."""
    images_without_boxes: Literal["drop", "keep"] = "drop"
    """Training images without a box: drop (Detectron) or keep as background."""
    empty_parents: Literal["drop", "keep"] = "drop"
    """Parent categories without boxes, such as the first of Roboflow's exports: drop them from the classes, or keep them."""
    bad_images: Literal["stop", "skip"] = option("stop", resume=True)
    """An image that is missing, broken or whose size differs from the JSON: stop with its name, or skip and count it."""
    orientation: Literal["auto", "stored", "turned"] = "auto"
    """Whether boxes refer to the stored pixels or to the rotated ones (turned), if an image has an EXIF orientation. auto:
    decided from images whose annotated size fits only one of the two."""
    undecided_orientation: Literal["turned", "stored"] = "turned"
    """Used by data.orientation auto if no image decides; set automatically in training."""
    bits: Literal["auto", 8, 10, 12, 14, 16] = "auto"
    """Bits that 16-bit images use: 2^bits - 1 is white. auto: found on a sample of the training images."""
    workers: int = option(0, ">= 0", outcome=False, per_host=True)
    """Images decoded in parallel on a host; 0: one per core. Use more if files arrive slowly."""
    prefetch: int = option(2, ">= 1", unit="batches", outcome=False)
    """Batches prepared ahead of the device."""


@dataclass(frozen=True)
class ModelConfig:
    """The network (Section 4, Figure 3)."""

    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101",
        "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    ] = option("resnet50", basic=True)  # fmt: skip
    """Backbone. Paper: resnet50 for the ablations, resnet101 in Tables 1d, 1e and 2, resnext101_32x8d in Table 2."""
    base_width: int = option(64, ">= 1")
    """Channels of the backbone's stem; all stages scale with it. ResNet: 64."""
    stage_blocks: tuple[int, ...] = option((), ">= 1")
    """Blocks of the four stages C2 to C5; empty: the backbone's own (resnet50: 3 4 6 3)."""
    num_classes: int | None = option(None, ">= 1")
    """Object classes K; None: the number of categories in the data. COCO: 80."""
    stride_position: Literal["1x1", "3x3"] = "1x1"
    """Convolution with the stride of a bottleneck. 1x1: the paper's MSRA weights, Detectron; 3x3: torchvision."""
    norm: Literal["frozen", "frozen_statistics", "group", "batch"] = "frozen"
    """Backbone normalisation: frozen BatchNorm (a fixed affine; Detectron); frozen_statistics: fixed mean and variance,
    trained scale and bias (mmdetection); GroupNorm; or BatchNorm over all devices."""
    norm_groups: int = option(32, ">= 1")
    """Groups of GroupNorm; lowered to the largest divisor of the channels if it does not divide them."""
    frozen_stages: int = option(2, ">= 0, <= 5")
    """Number of fixed backbone stages, counted from the stem: 0 none, 1 stem, 2 stem and C2, ... 5 all. Detectron: 2."""
    min_level: int = option(3, ">= 2, <= 5")
    """Finest pyramid level (stride 2^level). Paper: 3."""
    max_level: int = option(7, ">= 5, <= 8")
    """Coarsest pyramid level. Paper: 7."""
    p6_from: Literal["c5", "p5"] = "c5"
    """Input of the convolution that makes P6. Paper: c5; torchvision v1: p5."""
    fpn_channels: int = option(256, ">= 1")
    """Channels of every pyramid level. Paper: 256."""
    head_convs: int = option(4, ">= 0")
    """3x3 convolutions before the last one in each head. Paper: 4."""
    head_channels: int = option(256, ">= 1")
    """Channels of the heads. Paper: 256."""
    head_norm: Literal["none", "group", "batch"] = "none"
    """Normalisation in the heads: none (paper); group (torchvision v2); batch: a BatchNorm over all devices for each pyramid
    level, between shared convolutions (TensorFlow Model Garden, EfficientDet)."""
    head_std: float = option(0.01, "> 0")
    """Standard deviation of the heads' initial weights. Paper: 0.01."""
    prior: float = option(0.01, "> 0, < 1")
    """Initial probability pi of each class at every anchor: class bias = -log((1 - pi) / pi). Paper: 0.01."""
    input_normalisation: Literal["detectron", "detectron2", "imagenet"] = "detectron"
    """detectron: BGR 0-255 minus (102.9801, 115.9465, 122.7717); detectron2: BGR minus (103.53, 116.28, 123.675);
    imagenet: RGB 0-1 minus mean over standard deviation (torchvision)."""
    backbone_weights: str = option("", per_host=True, basic=True)
    """Initial weights of the backbone: imagenet (downloaded, those that fit backbone and input_normalisation), a file of
    torchvision, timm, detectron2 or Detectron, KIND:NAME, or empty: random. Read at step 0 only. Paper: ImageNet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions; parameters, losses and decoding are always float32."""
    remat: bool = False
    """Recompute the backbone's blocks in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class AnchorConfig:
    """Anchor boxes (Section 4, Anchors)."""

    style: Literal["paper", "detectron", "detectron2", "torchvision"] = "paper"
    """paper: exact sizes, centred on the cell, scale-major; detectron: rounded sizes, its pixel convention and order;
    detectron2: the paper's, centred on the cell's corner; torchvision: truncated sizes, rounded cells, ratio-major."""
    size_factor: float = option(4.0, "> 0")
    """Side of a level's square base anchor over its stride: 32 px on P3 to 512 px on P7. Paper: 4."""
    scales: tuple[float, ...] = option((1.0, 2.0 ** (1 / 3), 2.0 ** (2 / 3)), "> 0")
    """Sub-octave scales of the base anchor. Paper: 2^0, 2^(1/3), 2^(2/3)."""
    ratios: tuple[float, ...] = option((0.5, 1.0, 2.0), "> 0")
    """Height over width. Paper: 1:2, 1:1, 2:1."""


@dataclass(frozen=True)
class MatchingConfig:
    """Assignment of anchors to ground truth (Section 4, Anchors)."""

    positive_iou: float = option(0.5, "> 0, <= 1")
    """Smallest IoU of a positive anchor, the threshold included. Paper: 0.5."""
    negative_iou: float = option(0.4, "> 0, <= 1")
    """IoU below which an anchor is background; between the two it is ignored. Paper: 0.4."""
    low_quality: Literal["none", "band", "all"] = "band"
    """A ground-truth box whose best anchor is below positive_iou. none: no match (Section 4's thresholds only); band: a
    match if its IoU is at least negative_iou (Detectron); all: always a match (RPN's rule; detectron2, torchvision)."""


@dataclass(frozen=True)
class LossConfig:
    """Training loss (Sections 3 and 4.1)."""

    kind: Literal["cross_entropy", "balanced_cross_entropy", "focal", "focal_star", "hinge"] = "focal"
    """Classification loss: equation 1, 3, 5 or 8, or the hinge on p_t of Section 5.1. Paper: focal."""
    alpha: float = option(0.25, ">= 0, <= 1")
    """Weight of positives, 1 - alpha of negatives (not used by cross_entropy). Paper: 0.25 with gamma 2."""
    gamma: float = option(2.0, ">= 0", basic=True)
    """Focusing parameter of focal (0 is balanced cross entropy, equation 3); steepness of focal_star, above 0. Paper: 2."""
    star_beta: float = 0.0
    """Shift of focal_star, equation 7's beta. Paper: 1 with gamma 2, 0 with gamma 4."""
    hinge_margin: float = option(0.5, "> 0, <= 1")
    """p_t from which the hinge loss is 0. The paper does not give its value."""
    mining: Literal["none", "ohem", "ohem_1_3", "ohem_1_3_strict"] = "none"
    """Anchors whose classification loss is summed (Table 1d): none: all; ohem: an image's hardest mining_batch after NMS;
    ohem_1_3: at most a quarter of them positive, the rest negative; ohem_1_3_strict: exactly 3 negatives per positive.
    Paper: none."""
    mining_batch: int = option(128, ">= 1")
    """Anchors mined per image (the minibatch). Paper: 128, 256, 512."""
    mining_nms_iou: float = option(0.5, "> 0, <= 1")
    """An anchor is not mined if a harder one has an IoU with it above this. Paper: 0.5, 0.7."""
    mining_normaliser: Literal["assigned", "minibatch"] = "assigned"
    """Count that divides the mined classification loss: anchors assigned to a box (paper), or in the minibatch (OHEM)."""
    box: Literal["smooth_l1", "l1", "giou"] = "smooth_l1"
    """Box regression loss. Paper: smooth_l1."""
    beta: float = option(0.11, ">= 0")
    """Smooth L1 is quadratic below this, in units of the box deltas. Detectron: 0.11."""
    box_weight: float = option(1.0, ">= 0")
    """Weight of the box loss in the sum. Paper: 1."""
    normaliser: Literal["per_image", "per_device", "global", "ema"] = option("per_image", first_default="global")
    """Number of positive anchors, at least 1, that divides the loss: per_image: of each image, then the mean over images
    (paper); per_device: of each device, then the mean (Detectron); global: of the batch; ema: a running mean of the
    devices' counts (detectron2: momentum 0.9 from 100)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimization (Section 4.1)."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, weight decay added to the gradient before it; or adamw. Paper: sgd."""
    learning_rate: float = option(0.01, ">= 0", basic=True)
    """Peak learning rate. Paper: 0.01 for 16 images per step."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by data.batch_size / 16 (the linear scaling rule)."""
    schedule: Literal["piecewise", "cosine", "constant"] = "piecewise"
    """Learning rate, before the warm-up's factor. piecewise: drops at the boundaries (paper); cosine: half a cosine, from
    the peak at step 0 to 0 at training.steps, so that a resumed run keeps its steps; constant: the peak."""
    momentum: float = option(0.9, ">= 0, < 1")
    """Momentum of sgd, beta 1 of adamw. Paper: 0.9."""
    weight_decay: float = option(1e-4, ">= 0")
    """Weight decay. Paper: 0.0001."""
    bias_learning_rate_factor: float = option(2.0, ">= 0")
    """Learning rate of biases over that of weights. Detectron: 2; detectron2 and torchvision: 1."""
    decay_biases: bool = False
    """Decay the biases of convolutions too (detectron2, torchvision: yes); normalisation parameters never decay."""
    warmup_steps: int = option(500, ">= 0", unit="steps")
    """Steps of linear warm-up; it replaces the start of the schedule and does not shift it. Detectron: 500."""
    warmup_factor: float = option(1 / 3, ">= 0, <= 1")
    """Learning rate at step 0 over the peak. Detectron: 1/3."""
    boundaries: tuple[int, ...] = option((60_000, 80_000), ">= 1", unit="steps")
    """Steps at which the learning rate is multiplied by decay_factor (piecewise). Paper: 60000 80000."""
    boundary_epochs: tuple[float, ...] = option((), "> 0", unit="epochs")
    """The boundaries in epochs of the training images; if given, they replace boundaries, as training.epochs does steps."""
    decay_factor: float = option(0.1, "> 0")
    """Factor of the learning rate at each boundary. Paper: 0.1."""
    clip_norm: float = option(0.0, ">= 0")
    """Largest global norm of the gradient; 0: no clipping. Paper: none."""
    ema_decay: float = option(0.0, ">= 0, < 1")
    """Average the parameters (and statistics of BatchNorm) for evaluation and detection: after t steps,
    mean = d mean + (1 - d) new with d = min(ema_decay, (1 + t) / (10 + t)). 0: no average. Paper: none."""


@dataclass(frozen=True)
class DetectionConfig:
    """Logits to boxes (Section 4.1, Inference)."""

    score_threshold: float = option(0.05, ">= 0, < 1", basic=True)
    """Scores at or below this are dropped. Paper: 0.05."""
    threshold_coarsest: bool = True
    """Apply score_threshold on the coarsest level too; otherwise every score above 0 is kept there (Detectron)."""
    top_k: int = option(1000, ">= 1")
    """Number of best scores per pyramid level that are decoded. Paper: 1000."""
    nms_iou: float = option(0.5, "> 0, <= 1", basic=True)
    """A box is suppressed by a better one of its class with an IoU above this. Paper: 0.5."""
    class_agnostic_nms: bool = False
    """A box is suppressed by a better one of any class: at most one class per object. Paper: no."""
    clip: Literal["before_nms", "after_nms"] = "before_nms"
    """When boxes are clipped to the image: before NMS (Detectron, torchvision), or after it; after_nms: then boxes without
    area are removed (detectron2)."""
    max_detections: int = option(100, ">= 1")
    """Maximum number of detections per image. COCO: 100."""
    parameters: Literal["ema", "raw"] = "ema"
    """Parameters for detection: their average if the run has one (optimizer.ema_decay), or the parameters themselves."""
    tta_flip: bool = False
    """Test-time augmentation: also detect on the mirrored image; NMS merges the boxes, as in detectron2. Paper: none."""
    tta_short_sides: tuple[int, ...] = option((), ">= 1", unit="px")
    """Test-time augmentation: short sides in addition to data.short_side; data.long_side grows in proportion."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = option(90_000, ">= 0", unit="steps", basic=True)
    """Training steps. Paper: 90000."""
    epochs: float = option(0.0, ">= 0", unit="epochs")
    """Passes over the training images. If above 0, training.steps is epochs times images over data.batch_size, rounded up.
    0: training.steps is used (paper: about 12 epochs)."""
    log_every: int = option(20, ">= 1", unit="steps", outcome=False)
    """Steps between two lines of metrics."""
    eval_every: int = option(10_000, ">= -1", unit="steps", outcome=False)
    """Steps between evaluations; the last step is always evaluated. 0: only the last; -1: never."""
    patience: int = option(0, ">= 0", unit="evaluations")
    """Early stopping: training ends after this many evaluations in a row without a new best AP; the best step is kept. 0: it
    does not end early. Paper: none."""
    validation_loss: bool = option(False, outcome=False)
    """Compute the training loss of the evaluation images at each evaluation, with the parameters for detection: one more
    pass over the images, and one more program per padded shape."""
    eval_images: int = option(0, ">= 0")
    """Number of evaluation images, the first of the split; 0: all."""
    eval_batch_size: int = option(0, ">= 0", unit="images", outcome=False)
    """Images per evaluation step; 0: data.batch_size."""
    evaluator: Literal["arrays", "pycocotools"] = "arrays"
    """Computes the COCO scores: arrays (evaluation/precision_recall.py) or pycocotools. Both give the same numbers."""
    checkpoint_every: int = option(1000, ">= 1", unit="steps", outcome=False)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = option(2, ">= 1", outcome=False)
    """Number of newest checkpoints to keep; the best by AP is kept in addition."""
    pictures: int = option(8, ">= 0", outcome=False)
    """Evaluation images drawn with their detections at each evaluation."""
    tensorboard: bool = option(True, outcome=False)
    """Write TensorBoard files in addition to metrics.jsonl, with the pictures of each evaluation."""
    wandb: str = option("", outcome=False)
    """Weights & Biases project that receives metrics and pictures (pip install retina-jax[wandb]); empty: none."""
    accumulate: int = option(1, ">= 1")
    """Micro-batches per step and device (gradient accumulation): less memory, the same step, except with BatchNorm (batch in
    model.norm or head_norm) and with loss.normaliser per_device or ema, where each micro-batch counts as a device."""
    skip_non_finite: int = option(0, ">= 0", unit="steps")
    """Maximum number of skipped steps, those with a non-finite loss, gradient or parameter; one more stops the run."""
    profile_steps: str = ""
    """FIRST:LAST, steps to record with the profiler, both included, in RUN/profile; empty: none."""


@dataclass(frozen=True)
class Config:
    """An experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data and input pipeline."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Anchor boxes."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Assignment of anchors to ground truth."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    detection: DetectionConfig = field(default_factory=DetectionConfig, metadata={"option": Option(resume=True)})
    """Inference."""
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={"option": Option(resume=True)})
    """Loop."""
    cpu_kernels: bool = option(True, outcome=False)
    """On the CPU, use the faster convolutions and loss of retina_jax/cpu; equal to the plain ones up to rounding."""
    parallel: Literal["jit", "pmap"] = option("jit", outcome=False)
    """How a step is spread over the devices: jit over a data mesh, or pmap."""
    devices: int = option(0, ">= 0", outcome=False, basic=True)
    """Devices to use, over all hosts; 0: all. data.batch_size must be a multiple of it."""
    seed: int = option(0, ">= 0")
    """Seed of the initial weights, the data order and the augmentation."""
