"""The whole vocabulary of an experiment, as frozen dataclasses.

A config file (`configs/*.py`) is a Python file with a function `get_config() -> Config`; every field can be overridden
on the command line by its dotted name (`--loss.gamma 5 --data.batch-size 16`). Defaults are the paper's (RetinaNet-50-600,
Table 1): its text first, and where the text is silent, its authors' code (Detectron).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retina_jax.errors import PlainError


class ConfigError(PlainError, ValueError):
    """A config that cannot be meant; the message is one line that names the field and what would be right."""


@dataclass(frozen=True)
class ScenesConfig:
    """Generated scenes (`data.source scenes`), written once as JPEGs and COCO JSONs."""

    folder: str = "data/scenes"
    """Folder the scenes are written under; each setting gets its own sub-folder and is reused when it is there."""
    train_images: int = 3000
    """Images in the training split."""
    val_images: int = 400
    """Images in the validation split, drawn from other seeds than the training split."""
    size: int = 128
    """Side of the square images, pixels."""
    classes: int = 6
    """Object classes, 2 to 12: each is one shape in one hue."""
    max_objects: int = 5
    """Most objects in an image; each image has 0 to this many."""
    min_side: float = 8.0
    """Smallest object, square root of the box area, pixels."""
    max_side: float = 56.0
    """Largest object, square root of the box area, pixels."""
    lookalikes: int = 4
    """Most distractors an image: the right shape in a wrong hue or the right hue in a wrong shape."""
    seed: int = 0
    """Seed of the scenes themselves."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on, and how an image becomes a network input."""

    source: Literal["coco", "tfds", "scenes"] = "coco"
    """coco: a COCO-format JSON and an image folder; tfds: a TensorFlow dataset with COCO's features; scenes: generated."""
    train_annotations: str = ""
    """COCO JSON of the training images (source coco). Paper: trainval35k, which is instances_train2017.json."""
    train_images: str = ""
    """Folder of the training images (source coco)."""
    val_annotations: str = ""
    """COCO JSON of the evaluation images. Paper: minival, which is instances_val2017.json. With source tfds it may be empty
    or missing: the ground truth is then taken from the dataset's own features (areas truncated to integers)."""
    val_images: str = ""
    """Folder of the evaluation images (source coco)."""
    tfds_name: str = "coco/2017"
    """TensorFlow dataset (source tfds), or the folder of a prepared one."""
    tfds_folder: str = ""
    """TFDS data_dir; empty: TFDS's own default."""
    tfds_train_split: str = "train"
    """TFDS split trained on."""
    tfds_val_split: str = "validation"
    """TFDS split evaluated on."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """Generated scenes (source scenes)."""
    batch_size: int = 16
    """Images a training step, over all devices and hosts. Paper: 16 (2 on each of 8 GPUs)."""
    short_side: int = 600
    """Length the shorter image side is resized to, pixels. Paper: 600 for the ablations, 400 to 800 in Table 1e."""
    long_side: int = 1000
    """Most the longer side may be after the resize, pixels. Detectron: 1000 with 600, 1333 with 800; the paper gives the
    short side alone."""
    jitter_short_sides: tuple[int, ...] = ()
    """Short sides of multi-scale training (scale jitter, Table 2), drawn anew for each image and visit, all equally often;
    empty: short_side alone. Canvases are those of the largest, which the smaller images do not fill: as many programs, and a
    step costs what the largest does. Evaluation stays at short_side."""
    flip: bool = True
    """Flip half of the training images left to right. Paper: the only augmentation."""
    resize: Literal["bilinear", "antialias", "pillow"] = "bilinear"
    """bilinear: without antialiasing (cv2, Detectron, torchvision); antialias: with it; pillow: with it, equal to the last
    bit to Pillow's, which has integer weights and rounds twice (detectron2). pillow needs data.pixels uint8."""
    size_rounding: Literal["nearest", "floor"] = "nearest"
    """Sides of a resized image to whole pixels: nearest (Detectron, detectron2) or floor (torchvision)."""
    pixels: Literal["uint8", "float32"] = "uint8"
    """What a resize leaves: pixels rounded to uint8 (PIL, detectron2), or float32 ones, four times the bytes to the
    device (Detectron, torchvision)."""
    box_ends: Literal["half_open", "inclusive"] = "half_open"
    """How the right and lower ends of boxes are resized: as edges, x2 s; or as the last pixels that Detectron takes them
    for, (x2 - 1) s + 1."""
    buckets: Literal[0, 1, 2, 4] = 4
    """Canvas shapes that images are padded to: 4 = 2 orientations x 2 long sides, 2 = orientations, 1 = one square.
    As many programs are compiled. 0: in detection and evaluation the smallest canvas that holds the images, as torchvision,
    detectron2 and Detectron have it, and a program for each shape met; training then has 4."""
    pad_multiple: int = 32
    """Canvas sides are multiples of this, pixels; itself a multiple of 32."""
    box_format: Literal["auto", "xywh", "xyxy", "cxcywh", "xywh_fractions", "xyxy_fractions", "cxcywh_fractions"] = (
        "auto"
    )
    """Numbers of a bbox (source coco): xywh, COCO's corner and size in pixels; xyxy, two corners; cxcywh, centre and size;
    or the same as fractions of the image's sides. auto: xywh, refused where they look like another format."""
    crowds: Literal["ignore", "objects"] = "ignore"
    """Annotations with iscrowd 1 (source coco): ignore, as COCO does (not trained on; detections on them count neither way),
    or take them as objects, for tools that mark every mask as a crowd."""
    max_boxes: int = 100
    """Ground-truth boxes an image can hold; what overflows is counted and logged. COCO's fullest image has 93."""
    images_without_boxes: Literal["drop", "keep"] = "drop"
    """Training images without a box: drop (Detectron) or keep as pure background."""
    empty_parents: Literal["drop", "keep"] = "drop"
    """A category without boxes that groups others, such as the first one of Roboflow's exports: drop it from the classes,
    or keep it. A run that is resumed keeps its classes. Which ones are recognised: retina_jax/data/classes.py."""
    bad_images: Literal["stop", "skip"] = "stop"
    """An image that is missing, broken or of another size than the JSON says: stop naming it, or skip (named, counted)."""
    orientation: Literal["auto", "stored", "turned"] = "auto"
    """Pixels that boxes lie on where an image has an EXIF orientation and its annotated size is that of both: as stored, or
    turned as viewers show them. auto: as the images whose size shows it have it."""
    undecided_orientation: Literal["turned", "stored"] = "turned"
    """What auto is where no image shows it. Training sets it to what its training or evaluation images show."""
    bits: Literal["auto", 8, 10, 12, 14, 16] = "auto"
    """Bits that 16-bit images use: 2^bits - 1 is white. auto: found on a sample of the training images."""
    workers: int = 0
    """Images decoded at once on a host; 0: as many as there are cores. More where files are slow to come."""
    prefetch: int = 2
    """Batches made ready ahead of the device."""


@dataclass(frozen=True)
class ModelConfig:
    """The network (Section 4, Figure 3)."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d"] = "resnet50"
    """Backbone. Paper: resnet50 for the ablations, resnet101 in Tables 1d, 1e and 2, resnext101_32x8d in Table 2."""
    base_width: int = 64
    """Channels of the backbone's stem; all stages scale with it. ResNet's own: 64."""
    stage_blocks: tuple[int, ...] = ()
    """Blocks of the four stages C2 to C5; empty: the backbone's own (resnet50: 3 4 6 3)."""
    num_classes: int | None = None
    """Object classes K; None: as many as the dataset has categories. COCO: 80."""
    stride_position: Literal["1x1", "3x3"] = "1x1"
    """Convolution that carries a bottleneck's stride. 1x1: the MSRA weights that the paper starts from, Detectron; 3x3:
    torchvision."""
    norm: Literal["frozen", "group", "batch"] = "frozen"
    """Backbone normalisation: frozen BatchNorm (an affine that is never trained), GroupNorm, or BatchNorm with statistics
    over the complete batch of all devices. Detectron: frozen; the paper does not mention BatchNorm."""
    norm_groups: int = 32
    """Groups of GroupNorm; lowered to a divisor of the channels where they are fewer."""
    frozen_stages: int = 2
    """Backbone parts never trained, counted from the stem: 0 none, 1 stem, 2 stem and C2, ... 5 all. Detectron: 2."""
    min_level: int = 3
    """Finest pyramid level (stride 2^level). Paper: 3."""
    max_level: int = 7
    """Coarsest pyramid level. Paper: 7."""
    p6_from: Literal["c5", "p5"] = "c5"
    """Map that P6 is convolved from. Paper: c5; torchvision v1: p5."""
    fpn_channels: int = 256
    """Channels of every pyramid level. Paper: 256."""
    head_convs: int = 4
    """3x3 convolutions before the last one in each head. Paper: 4."""
    head_channels: int = 256
    """Channels of the heads. Paper: 256."""
    head_norm: Literal["none", "group"] = "none"
    """Normalisation in the heads. Paper: none; torchvision v2: group."""
    head_std: float = 0.01
    """Standard deviation of the heads' initial weights. Paper: 0.01."""
    prior: float = 0.01
    """Probability of foreground an anchor starts with, pi: class bias = -log((1 - pi) / pi). Paper: 0.01."""
    input_normalisation: Literal["detectron", "detectron2", "imagenet"] = "detectron"
    """detectron: BGR 0-255 minus (102.9801, 115.9465, 122.7717); detectron2: BGR minus (103.53, 116.28, 123.675);
    imagenet: RGB 0-1 minus mean over standard deviation (torchvision)."""
    backbone_weights: str = ""
    """Weights the backbone starts from: imagenet (fetched, those that fit the backbone and input_normalisation), a file of
    torchvision, timm, detectron2 or Detectron, KIND:NAME, or empty: random. Read at step 0 alone. Paper: ImageNet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions; parameters, losses and decoding are float32 always."""
    remat: bool = False
    """Recompute the backbone's blocks in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class AnchorConfig:
    """Anchor boxes (Section 4, Anchors)."""

    style: Literal["paper", "detectron", "detectron2", "torchvision"] = "paper"
    """paper: exact sizes, centred on the cell, scale-major; detectron: its rounded sizes, pixel convention and order;
    detectron2: the paper's, centred on the cell's upper left corner; torchvision: its truncated sizes and rounded cells,
    ratio-major, strides from the map sizes."""
    size_factor: float = 4.0
    """Side of a level's square base anchor over its stride: 32 px on P3 to 512 px on P7. Paper: 4."""
    scales: tuple[float, ...] = (1.0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))
    """Sub-octave scales of the base anchor. Paper: 2^0, 2^(1/3), 2^(2/3)."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width. Paper: 1:2, 1:1, 2:1."""


@dataclass(frozen=True)
class MatchingConfig:
    """Anchors to ground truth (Section 4, Anchors)."""

    positive_iou: float = 0.5
    """IoU from which an anchor is foreground, the threshold itself included. Paper: 0.5."""
    negative_iou: float = 0.4
    """IoU below which an anchor is background; between the two it is ignored. Paper: 0.4."""
    low_quality: Literal["none", "band", "all"] = "band"
    """A box's best anchor below positive_iou: none leaves it (Section 4's thresholds alone); band takes it where its IoU is
    at least negative_iou (Detectron); all takes it always (RPN's rule, which the paper adopts with other thresholds;
    detectron2, torchvision)."""


@dataclass(frozen=True)
class LossConfig:
    """Training loss (Sections 3 and 4.1)."""

    kind: Literal["cross_entropy", "balanced_cross_entropy", "focal", "focal_star", "hinge"] = "focal"
    """Classification loss: equation 1, 3, 5 or 8, or the hinge on p_t of Section 5.1. Paper: focal."""
    alpha: float = 0.25
    """Weight of the foreground, 1 - alpha of the background (not used by cross_entropy). Paper: 0.25 with gamma 2."""
    gamma: float = 2.0
    """Focusing parameter of focal, >= 0 (0 is cross entropy); steepness of focal_star, > 0. Paper: 2."""
    star_beta: float = 0.0
    """Shift of focal_star, equation 7's beta. Paper: 1 with gamma 2, 0 with gamma 4."""
    hinge_margin: float = 0.5
    """p_t from which on the hinge loss is 0. The paper does not give its own."""
    mining: Literal["none", "ohem", "ohem_1_3", "ohem_1_3_strict"] = "none"
    """Anchors whose classification loss is summed (Table 1d): none takes all; ohem the hardest mining_batch of an image
    after NMS; ohem_1_3 the hardest positives, at most a quarter of mining_batch, and fills it with the hardest negatives;
    ohem_1_3_strict takes 3 negatives per positive taken, however few those are. Paper: none."""
    mining_batch: int = 128
    """Anchors mined per image (the minibatch). Paper: 128, 256, 512."""
    mining_nms_iou: float = 0.5
    """An anchor is not mined next to a harder one with an IoU above this. Paper: 0.5, 0.7."""
    mining_normaliser: Literal["assigned", "minibatch"] = "assigned"
    """Count that divides the mined classification loss: anchors assigned to a box, as without mining, or anchors in the
    minibatch (Shrivastava et al., 2016, whose OHEM averages over it). Paper: none but the first."""
    box: Literal["smooth_l1", "l1", "giou"] = "smooth_l1"
    """Box regression loss. Paper: smooth_l1."""
    beta: float = 0.11
    """Smooth L1 is quadratic below this, in units of the box deltas. Detectron: 0.11."""
    box_weight: float = 1.0
    """Weight of the box loss in the sum. Paper: 1."""
    normaliser: Literal["per_image", "per_device", "global", "ema"] = "per_image"
    """Number of positive anchors that divides the loss, at least 1: per_image that of each image, then the mean over images;
    per_device that of each device, then the mean (Detectron); global that of the batch; ema a running mean of the devices'
    counts (detectron2: momentum 0.9 from 100). Paper: per_image."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimization (Section 4.1)."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, weight decay added to the gradient before it; or adamw. Paper: sgd."""
    learning_rate: float = 0.01
    """Peak learning rate. Paper: 0.01 for 16 images a step."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by data.batch_size / 16."""
    momentum: float = 0.9
    """Momentum of sgd, beta 1 of adamw. Paper: 0.9."""
    weight_decay: float = 1e-4
    """Weight decay. Paper: 0.0001."""
    bias_learning_rate_factor: float = 2.0
    """Learning rate of biases over that of weights. Detectron: 2; detectron2 and torchvision: 1."""
    decay_biases: bool = False
    """Weight decay on the biases of convolutions too; normalisation parameters never decay. Detectron: no; detectron2 and
    torchvision: yes."""
    warmup_steps: int = 500
    """Steps of linear warm-up; it replaces the start of the schedule and does not shift it. Detectron: 500."""
    warmup_factor: float = 1 / 3
    """Learning rate at step 0 over the peak. Detectron: 1/3."""
    boundaries: tuple[int, ...] = (60_000, 80_000)
    """Steps from which on, themselves included, the rate is multiplied by decay_factor. Paper: 60000 80000."""
    decay_factor: float = 0.1
    """What each boundary multiplies the learning rate by. Paper: 0.1."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0: no clipping. Paper: none."""
    ema_decay: float = 0.0
    """Keep running means of the parameters (and statistics of model.norm batch), which evaluation and detection then take:
    each step mean = d mean + (1 - d) new, d = min(ema_decay, (1 + t) / (10 + t)) after t steps. 0: none. Paper: none."""


@dataclass(frozen=True)
class DetectionConfig:
    """Logits to boxes (Section 4.1, Inference)."""

    score_threshold: float = 0.05
    """Scores at or below this are dropped. Paper: 0.05."""
    threshold_coarsest: bool = True
    """Drop them on the coarsest level too. Detectron keeps all scores above 0 there."""
    top_k: int = 1000
    """Best scores decoded a pyramid level. Paper: 1000."""
    nms_iou: float = 0.5
    """A box is suppressed by a better one of its class with an IoU above this. Paper: 0.5."""
    clip: Literal["before_nms", "after_nms"] = "before_nms"
    """When boxes are cut to the image: before the suppression (Detectron, torchvision), or after it and those left without
    area are dropped (detectron2)."""
    max_detections: int = 100
    """Detections an image. COCO: 100."""
    parameters: Literal["ema", "raw"] = "ema"
    """What detects: the running means of the parameters, where the run keeps some (optimizer.ema_decay), or the parameters
    themselves."""
    tta_flip: bool = False
    """Test-time augmentation: ask the mirrored image as well. Answers are merged by nms_iou, class by class, as detectron2
    merges them, and cut to max_detections. Paper: none."""
    tta_short_sides: tuple[int, ...] = ()
    """Test-time augmentation: short sides asked beside data.short_side, pixels; data.long_side grows in proportion."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 90_000
    """Training steps. Paper: 90000."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    eval_every: int = 10_000
    """Steps between evaluations; the last step is always evaluated. 0: only the last; -1: never."""
    eval_images: int = 0
    """Images evaluated, the first ones of the split; 0: all."""
    eval_batch_size: int = 0
    """Images an evaluation step; 0: data.batch_size."""
    evaluator: Literal["arrays", "pycocotools"] = "arrays"
    """Who counts the COCO scores: arrays (retina_jax/evaluation/precision_recall.py) or pycocotools. Both give the same numbers."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best by AP is kept beside them."""
    pictures: int = 8
    """Evaluation images drawn with their detections at each evaluation."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl, with the pictures of each evaluation."""
    wandb: str = ""
    """Weights & Biases project that metrics and pictures go to as well (pip install wandb); empty: none."""
    accumulate: int = 1
    """Parts in which a device takes its images of a step, one after the other: as much less memory, the same step. To
    normalisers per_device and ema each part is a device of its own; norm batch takes statistics of a part at a time."""
    skip_non_finite: int = 0
    """Steps in all that may come out with a loss, gradient or parameters that are not finite, and are left out; one more
    stops the run. 0: the first one does."""
    profile_steps: str = ""
    """FIRST:LAST, steps to record with the profiler, both included, into RUN/profile; empty: none."""


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
    """Anchors to ground truth."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Inference."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Loop."""
    parallel: Literal["jit", "pmap"] = "jit"
    """Driver of the step over the devices: jit over a data mesh, or pmap."""
    devices: int = 0
    """Devices used, over all hosts; 0: all there are. data.batch_size is a multiple of it."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
