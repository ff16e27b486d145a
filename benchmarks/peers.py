"""Which models are compared with peers. Of this folder only this file and systems.py, which runs in peers' environments, name backbones."""

VIT, RESNET, LITE, BIOMED = "ViT-B/32", "RN50", "pmclip-lite", "BiomedCLIP"  # the first is the one that every peer has
MODELS = {VIT: "vit-b-32", RESNET: "rn50", LITE: "pmclip-lite"}  # and its folder
