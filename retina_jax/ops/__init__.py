"""Operations on boxes as pure functions: anchors, matching, NMS and postprocessing."""
