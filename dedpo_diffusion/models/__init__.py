"""Base models from a folder, the hub or a single file; the UNet with its adapter and reference; text encoders; tiny random models.

Public: loading.load_pipeline, single_file, backbone.Backbone, text_encoders.TextEncoders, tiny.build, pretrained, sharded_tensors.
May import: core, dpo, labels, pairs.
"""
