"""Self-ensembling contrastive learning for semi-supervised medical image segmentation."""
