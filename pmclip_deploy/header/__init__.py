"""What a DICOM file says of its picture."""
