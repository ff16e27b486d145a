"""Attributes of a patient, which nothing may print, log or store."""

PATIENT = {
    "PatientName": "ZQXNAME^ZQXFIRST",
    "PatientID": "ZQXID-4711",
    "PatientBirthDate": "18990102",
    "PatientAddress": "ZQXSTREET 5",
    "OtherPatientIDs": "ZQXOTHER",
    "InstitutionName": "ZQXHOSPITAL",
    "ReferringPhysicianName": "ZQXDOCTOR",
    "AccessionNumber": "ZQXACCESSION",
    "StudyDescription": "ZQXSTUDY",
    "PatientComments": "ZQXCOMMENT",
    "PatientAge": "ZQXAGE-IS-TOO-LONG",  # invalid: pydicom's warnings quote such values
    "StudyDate": "ZQXDATE",
    "StudyInstanceUID": "ZQXUID",
}
