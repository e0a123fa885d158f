#if canImport(CoreML)
    import Foundation
    import Phi3Core

    #if os(Linux)
        import CoreML
    #else
        @preconcurrency import CoreML
    #endif

    /// Is a loaded function what the manifest says? Core ML would answer a call of another form with a
    /// number, or with nothing at all.
    enum SchemaCheck {
        /// What differs, one line each.
        static func differences(
            _ description: MLModelDescription, _ function: String, _ signature: Manifest.Signature
        ) -> [String] {
            var lines: [String] = []
            let found = FunctionForm(
                inputs: multiArrays(
                    "\(function) input", description.inputDescriptionsByName, &lines),
                outputs: multiArrays(
                    "\(function) output", description.outputDescriptionsByName, &lines),
                states: states("\(function) state", description.stateDescriptionsByName, &lines))
            return lines
                + found.differences(
                    function, from: FunctionForm(signature),
                    sides: (found: "the package", wanted: "the manifest"))
        }

        private static func multiArrays(
            _ place: String, _ features: [String: MLFeatureDescription], _ lines: inout [String]
        ) -> [TensorForm] {
            features.compactMap { name, feature in
                let constraint = feature.multiArrayConstraint
                guard let constraint, let kind = kind(constraint.dataType) else {
                    lines.append("\(place) \(name) is no array of a kind that a package has")
                    return nil
                }
                return TensorForm(
                    name: name, shape: constraint.shape.map(\.intValue), type: kind)
            }
        }

        private static func states(
            _ place: String, _ features: [String: MLFeatureDescription], _ lines: inout [String]
        ) -> [TensorForm] {
            features.compactMap { name, feature in
                guard let constraint = feature.stateConstraint, let kind = kind(constraint.dataType)
                else {
                    lines.append("\(place) \(name) is no state of a kind that a package has")
                    return nil
                }
                let shape: [Int] = constraint.bufferShape
                return TensorForm(name: name, shape: shape, type: kind)
            }
        }

        private static func kind(_ type: MLMultiArrayDataType) -> Manifest.TensorFacts.Kind? {
            switch type {
            case .int32: return .int32
            case .float16: return .float16
            case .float32: return .float32
            default: return nil
            }
        }
    }
#endif
