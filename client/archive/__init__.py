"""Images from the hospital's archive (PACS): query, transfer, de-identification on arrival. The one door to DICOM networking."""
