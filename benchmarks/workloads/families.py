"""Networks of torchvision and timm, one or more of each family that has BatchNorms, by name. Imports nothing."""

TORCHVISION = (
    "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2",
    "mobilenet_v3_large", "shufflenet_v2_x1_0", "vgg11_bn", "deeplabv3_resnet50", "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)  # fmt: skip
DETECTORS = (
    "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
# As they are fine-tuned.
FROZEN_DETECTORS = tuple(f"{name}_frozen" for name in DETECTORS[:3])
TIMM = (
    "convmixer_768_32", "cspdarknet53", "cspresnet50", "darknet53", "densenet121", "dla34", "dla60_res2net", "dpn68",
    "efficientnet_b0", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw", "fasternet_t0", "fastvit_t8",
    "fbnetv3_b", "gernet_s", "ghostnet_100", "ghostnetv2_100", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "hrnet_w18_small", "iformer_t", "inception_resnet_v2", "inception_v4", "lcnet_050", "legacy_seresnet18",
    "lowformer_b0", "mixnet_s", "mnasnet_100", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs",
    "nextvit_small", "pnasnet5large", "regnetx_002", "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9",
    "res2net50_26w_4s", "resnest14d", "resnetrs50", "rexnet_100", "selecsls42b", "shvit_s1", "skresnet18",
    "spnasnet_100", "starnet_s1", "swiftformer_xs", "tf_efficientnetv2_b0", "tinynet_a", "tresnet_m", "vovnet39a",
    "xception41", "xcit_nano_12_p8_224",
)  # fmt: skip
FAMILIES = (
    *(f"torchvision/{name}" for name in (*TORCHVISION, *DETECTORS, *FROZEN_DETECTORS)),
    *(f"timm/{name}" for name in TIMM),
)
