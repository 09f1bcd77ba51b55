"""What the bytes of a block look like: tensor and byte codecs, chains of both, the record. Pure and synchronous."""
