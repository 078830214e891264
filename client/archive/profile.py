"""What becomes of each attribute of an X-ray image: the Basic Application Level Confidentiality Profile (DICOM PS3.15, E.2).

`KEPT` is all that stays, each value read and written anew in its own form, and `ACTIONS` says what Table E.1-1 asks for the
attributes that computed and digital radiographs have (PS3.3, A.2 and A.26) and how it is done here. What is in neither table is
removed, wherever it stands: private attributes, overlays, curves and every sequence go with the rest, but for
lookup tables and the codes of view and region.

Dates are removed rather than shifted. Nothing in training uses them, and a shift by patient would keep the intervals between
examinations, which single out a patient in the hospital's records. Age and sex are kept (Retain Patient Characteristics Option,
E.3.7), since a site's mix of them is needed to judge a model; the age is coarse and 90 at most.
"""

from __future__ import annotations

from enum import Enum


class Action(Enum):
    """What is done with an attribute; the letters are those of Table E.1-1."""

    REMOVE = "X"
    EMPTY = "Z"
    """The attribute stays without a value: its module requires that it is there (type 2)."""
    PSEUDONYM = "D"
    """A keyed pseudonym of the value, as Z and D allow ("a dummy value ... consistent with the VR", E.1)."""
    UID = "U"
    """A keyed pseudonym, the same for the same UID in all images of the site."""
    COARSEN = "K"
    """Kept in fewer steps, under the Retain Patient Characteristics Option."""


CODES = (
    *("Modality", "BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality", "PresentationIntentType"),
    *("PresentationLUTShape", "VOILUTFunction", "RescaleType", "PixelIntensityRelationship", "BurnedInAnnotation"),
    *("RecognizableVisualFeatures", "ConversionType", "DetectorType", "LossyImageCompression", "LossyImageCompressionMethod"),
    *("ImageType", "PatientSex"),
)
"""Kept where the value is one of `TERMS`, and for a view or a part of the body one of the terms of `common.imaging.patient_groups`."""

TERMS: dict[str, frozenset[str]] = {
    "Modality": frozenset({"CR", "DX", "DR", "RG", "XR", "OT", "SC", "CT", "MG", "IO", "PX", "RF", "XA", "MR", "US", "NM", "PT"}),
    "Laterality": frozenset({"R", "L"}),
    "ImageLaterality": frozenset({"R", "L", "U", "B"}),
    "PresentationIntentType": frozenset({"FOR PRESENTATION", "FOR PROCESSING"}),
    "PresentationLUTShape": frozenset({"IDENTITY", "INVERSE"}),
    "VOILUTFunction": frozenset({"LINEAR", "LINEAR_EXACT", "SIGMOID"}),
    "RescaleType": frozenset({"OD", "HU", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "LOG_E REL"}),
    "PixelIntensityRelationship": frozenset({"LIN", "LOG", "DISP"}),
    "BurnedInAnnotation": frozenset({"YES", "NO"}),
    "RecognizableVisualFeatures": frozenset({"YES", "NO"}),
    "ConversionType": frozenset({"DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"}),
    "DetectorType": frozenset({"DIRECT", "SCINTILLATOR", "STORAGE", "FILM"}),
    "LossyImageCompression": frozenset({"00", "01"}),
    "LossyImageCompressionMethod": frozenset({"ISO_10918_1", "ISO_14495_1", "ISO_15444_1", "ISO_13818_2", "ISO_14496_10"}),
    "ImageType": frozenset(
        {"ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "POST_PROCESSED", "AXIAL", "LOCALIZER", "OTHER", "SCREEN SAVE"}
    ),
    "PatientSex": frozenset({"M", "F", "O"}),
}
"""Defined and enumerated values of PS3.3 (C.7.3.1.1.1, C.7.3.1, C.8.7.1, C.8.11.1 to C.8.11.4, C.11.1 to C.11.6, C.7.6.1, C.7.1.1).
A value of Image Type that is none of them becomes an empty one, so that the others keep their places."""

VIEW_SEQUENCES = ("ViewCodeSequence", "AnatomicRegionSequence")
"""The code of the first item is kept if it is one that `common.imaging.dicom_views` knows, with that table's meaning, not the file's."""

ORIENTATION = "PatientOrientation"
"""Kept where it holds letters for directions only (C.7.6.1.1.1), else empty: type 2C."""

NUMBERS = (
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "WindowCenter", "WindowWidth"),
    *(
        "PixelIntensityRelationshipSign",
        "PixelSpacing",
        "ImagerPixelSpacing",
        "NominalScannedPixelSpacing",
        "PixelAspectRatio",
        "LossyImageCompressionRatio",
    ),
    *("KVP", "ExposureTime", "XRayTubeCurrent", "Exposure", "ExposureInuAs", "RelativeXRayExposure", "Sensitivity"),
    *("DistanceSourceToDetector", "DistanceSourceToPatient", "ExposureIndex", "TargetExposureIndex", "DeviationIndex"),
)
"""Kept as the decoder reads them: of `FIRST_NUMBERS` the first value, of windows the pairs that are usable, else all values or none."""

FIRST_NUMBERS = frozenset({"PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope"})
"""Attributes of one value, whatever a file has behind it."""

TEXTS = ("Manufacturer", "ManufacturerModelName")
"""Kept unless a part of the patient's name, a number or a name of the hospital stands in them."""

TABLES = ("ModalityLUTSequence", "VOILUTSequence")
"""The first item is kept, only its numbers: its name is not."""

LAYOUT = (
    *("SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelData"),
)
"""Written anew from the decoded image, so that nothing can stay in comments of a codestream, in unused bits (where overlays were
once hidden: PS3.5, 8.1.2) or behind the last pixel."""

STATED = (
    *("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    "LongitudinalTemporalInformationModified",
)
"""What the profile has the file say of itself (E.1.1, step 6; PS3.3, C.7.1.1 and C.12.1)."""

METHOD_CODES = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113108", "Retain Patient Characteristics Option"),
)
"""PS3.16, CID 7050."""

ACTIONS: dict[str, Action] = {
    **dict.fromkeys(("PatientID", "AccessionNumber"), Action.PSEUDONYM),
    **dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), Action.UID),
    "PatientAge": Action.COARSEN,
    **dict.fromkeys(
        (
            *("PatientName", "PatientBirthDate", "ReferringPhysicianName", "StudyDate", "StudyTime", "StudyID"),
            *("SeriesNumber", "InstanceNumber"),
        ),
        Action.EMPTY,
    ),
    **dict.fromkeys(
        (
            # Patient (C.7.1.1) and Patient Study (C.7.2.2)
            *("IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID", "OtherPatientIDs"),
            *("OtherPatientIDsSequence", "OtherPatientNames", "PatientBirthName", "PatientBirthTime", "PatientMotherBirthName"),
            *("PatientAddress", "PatientTelephoneNumbers", "PatientTelecomInformation", "PatientInsurancePlanCodeSequence"),
            *("PatientPrimaryLanguageCodeSequence", "PatientPrimaryLanguageModifierCodeSequence", "ReferencedPatientSequence"),
            *("ReferencedPatientPhotoSequence", "PatientComments", "PatientSize", "PatientWeight", "PatientSexNeutered"),
            *("PatientState", "PatientReligiousPreference", "EthnicGroup", "Occupation", "CountryOfResidence"),
            *("RegionOfResidence", "MilitaryRank", "BranchOfService", "InsurancePlanIdentification", "MedicalRecordLocator"),
            *("MedicalAlerts", "Allergies", "SmokingStatus", "PregnancyStatus", "LastMenstrualDate", "SpecialNeeds"),
            *("AdditionalPatientHistory", "ResponsiblePerson", "ResponsibleOrganization", "PatientInstitutionResidence"),
            *("PatientSpeciesDescription", "PatientBreedDescription", "BreedRegistrationSequence", "StrainAdditionalInformation"),
            # Visit
            *("AdmissionID", "IssuerOfAdmissionID", "IssuerOfAdmissionIDSequence", "AdmittingDate", "AdmittingTime"),
            *("AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence", "ServiceEpisodeID", "VisitComments"),
            *("ServiceEpisodeDescription", "IssuerOfServiceEpisodeID", "IssuerOfServiceEpisodeIDSequence"),
            *("CurrentPatientLocation", "ReasonForVisit", "ReasonForVisitCodeSequence", "DischargeDiagnosisDescription"),
            # Clinical Trial (C.7.1.3, C.7.2.3, C.7.3.2)
            *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID"),
            *("ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID"),
            *("ClinicalTrialTimePointDescription", "ClinicalTrialCoordinatingCenterName", "ClinicalTrialSeriesID"),
            *("ClinicalTrialSeriesDescription", "ClinicalTrialProtocolEthicsCommitteeName"),
            "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
            # General Study (C.7.2.1)
            *("StudyDescription", "ReferringPhysicianIdentificationSequence", "ReferringPhysicianAddress", "StudyComments"),
            *("ReferringPhysicianTelephoneNumbers", "ConsultingPhysicianName", "ConsultingPhysicianIdentificationSequence"),
            *("PhysiciansOfRecord", "PhysiciansOfRecordIdentificationSequence", "NameOfPhysiciansReadingStudy"),
            *(
                "PhysiciansReadingStudyIdentificationSequence",
                "RequestingService",
                "RequestingPhysician",
                "ReferencedStudySequence",
            ),
            *("ProcedureCodeSequence", "ReasonForStudy", "IssuerOfAccessionNumberSequence", "RequestedProcedureDescription"),
            *(
                "RequestedProcedureCodeSequence",
                "ReasonForPerformedProcedureCodeSequence",
                "RequestedContrastAgent",
                "StudyIDIssuer",
            ),
            # General Series (C.7.3.1)
            *("SeriesDate", "SeriesTime", "SeriesDescription", "SeriesDescriptionCodeSequence", "PerformingPhysicianName"),
            *("PerformingPhysicianIdentificationSequence", "OperatorsName", "OperatorIdentificationSequence", "ProtocolName"),
            *("ReferencedPerformedProcedureStepSequence", "RelatedSeriesSequence", "RequestAttributesSequence"),
            *("PerformedProcedureStepID", "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime"),
            *("PerformedProcedureStepEndDate", "PerformedProcedureStepEndTime", "PerformedProcedureStepDescription"),
            *("PerformedProtocolCodeSequence", "CommentsOnThePerformedProcedureStep", "PerformedStationAETitle"),
            *("PerformedStationName", "PerformedLocation", "ScheduledProcedureStepID", "RequestedProcedureID"),
            *(
                "ScheduledProcedureStepDescription",
                "RequestedProcedureComments",
                "ImagingServiceRequestComments",
                "TreatmentSessionUID",
            ),
            # General Equipment (C.7.5.1), Device (C.7.6.12)
            *("InstitutionName", "InstitutionAddress", "InstitutionCodeSequence", "InstitutionalDepartmentName", "StationName"),
            *("InstitutionalDepartmentTypeCodeSequence", "StationAETitle", "DeviceSerialNumber", "DeviceUID", "GantryID"),
            *("SoftwareVersions", "UDISequence", "UniqueDeviceIdentifier", "ManufacturerDeviceClassUID", "DeviceSequence"),
            *("DateOfManufacture", "DateOfInstallation", "DateOfLastCalibration", "TimeOfLastCalibration"),
            *("DateTimeOfLastCalibration", "CalibrationDateTime", "DeviceDescription", "LongDeviceDescription"),
            # General Image (C.7.6.1), General Acquisition, General Reference (C.12.4)
            *("ContentDate", "ContentTime", "AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "AcquisitionUID"),
            *("AcquisitionNumber", "ImageComments", "DerivationDescription", "DerivationCodeSequence", "SourceImageSequence"),
            *("ReferencedImageSequence", "ReferencedInstanceSequence", "SourceInstanceSequence", "IrradiationEventUID"),
            *("IconImageSequence", "FrameOfReferenceUID", "SynchronizationFrameOfReferenceUID", "AcquisitionComments"),
            *(
                "IdentifyingComments",
                "ImagePresentationComments",
                "TextComments",
                "FrameComments",
                "WindowCenterWidthExplanation",
            ),
            # Contrast (C.7.6.4), Specimen (C.7.6.22)
            *("ContrastBolusAgent", "ContrastBolusAgentSequence", "ContrastBolusStartTime", "ContrastBolusStopTime"),
            *("ContainerIdentifier", "IssuerOfTheContainerIdentifierSequence", "SpecimenDescriptionSequence"),
            # CR Series and Image (C.8.1), Secondary Capture (C.8.6.1)
            *("FilterType", "FocalSpots", "PlateType", "PlateID", "CassetteID", "PhosphorType", "CassetteOrientation"),
            *("AcquisitionDeviceProcessingDescription", "AcquisitionDeviceProcessingCode", "DateOfSecondaryCapture"),
            *("TimeOfSecondaryCapture", "SecondaryCaptureDeviceID", "SecondaryCaptureDeviceManufacturer", "GeneratorID"),
            *(
                "SecondaryCaptureDeviceManufacturerModelName",
                "SecondaryCaptureDeviceSoftwareVersions",
                "DigitalImageFormatAcquired",
            ),
            # DX Series, Anatomy, Image, Detector, Positioning, Collimator, Dose, Generation, Filtration, Grid (C.8.7, C.8.11)
            *("PrimaryAnatomicStructureSequence", "AcquisitionContextSequence"),
            *(
                "DetectorID",
                "DetectorDescription",
                "DetectorMode",
                "DateOfLastDetectorCalibration",
                "TimeOfLastDetectorCalibration",
            ),
            *("DetectorManufacturerName", "DetectorManufacturerModelName", "ProjectionEponymousNameCodeSequence", "GridID"),
            *("CommentsOnRadiationDose", "ExposureDoseSequence", "FilterMaterial", "AcquisitionProtocolDescription"),
            *("XRayDetectorID", "XRaySourceID", "XRayDetectorLabel", "AcquisitionFieldOfViewLabel"),
            # Overlays and curves (C.9; retired), SOP Common (C.12.1), signatures and history
            *("OverlayDate", "OverlayTime", "CurveDate", "CurveTime", "SpecificCharacterSet", "TimezoneOffsetFromUTC"),
            *("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID", "InstanceCoercionDateTime"),
            *("ContentCreatorName", "ContentCreatorIdentificationCodeSequence", "ContributingEquipmentSequence"),
            *("OriginalAttributesSequence", "ModifiedAttributesSequence", "DigitalSignaturesSequence", "MACParametersSequence"),
            *("EncryptedAttributesSequence", "ConversionSourceAttributesSequence", "ReferencedDefinedProtocolSequence"),
            *("QueryRetrieveView", "ContentQualification", "PrivateDataElementCharacteristicsSequence", "BarcodeValue"),
            *("LabelText", "DataSetTrailingPadding", "StorageMediaFileSetUID", "ReferencedSOPInstanceUID", "RetrieveAETitle"),
        ),
        Action.REMOVE,
    ),
}
"""By keyword. Where Table E.1-1 leaves a choice (X/Z, X/Z/D, Z/D) the first that the modules of CR and DX images allow is taken."""

KEPT = frozenset((*CODES, *NUMBERS, *TEXTS, *TABLES, *VIEW_SEQUENCES, ORIENTATION, *LAYOUT, *STATED))
WRITTEN = KEPT | {keyword for keyword, action in ACTIONS.items() if action is not Action.REMOVE}
"""All keywords that a de-identified file can hold at its top level."""
