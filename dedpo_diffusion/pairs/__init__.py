"""Pair datasets on disk: reading, writing, decoding images, importing public formats, exporting, inspecting.

Public: dataset.PairReader, dataset.PairWriter, decoding.decode_image, pixels.pair_views, formats, inspection.
May import: core, debias, labels, settings.
"""
