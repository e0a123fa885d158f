import Foundation
import Phi3Core

/// What a function takes, gives and keeps.
public class MLModelDescription {
    /// Inputs by name.
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    /// Outputs by name.
    public let outputDescriptionsByName: [String: MLFeatureDescription]
    /// States by name.
    public let stateDescriptionsByName: [String: MLFeatureDescription]

    init(_ signature: Manifest.Signature) {
        func arrays(_ tensors: [Manifest.TensorFacts]) -> [String: MLFeatureDescription] {
            Dictionary(
                tensors.map {
                    let constraint = MLMultiArrayConstraint($0)
                    return ($0.name, MLFeatureDescription($0.name, array: constraint, state: nil))
                }
            ) { first, _ in first }
        }
        inputDescriptionsByName = arrays(signature.inputs)
        outputDescriptionsByName = arrays(signature.outputs)
        stateDescriptionsByName = Dictionary(
            signature.states.map {
                let constraint = MLStateConstraint($0)
                return ($0.name, MLFeatureDescription($0.name, array: nil, state: constraint))
            }
        ) { first, _ in first }
    }
}

/// One input, output or state.
public class MLFeatureDescription {
    /// Its name.
    public let name: String
    /// The form of an array.
    public let multiArrayConstraint: MLMultiArrayConstraint?
    /// The form of a state.
    public let stateConstraint: MLStateConstraint?

    init(_ name: String, array: MLMultiArrayConstraint?, state: MLStateConstraint?) {
        self.name = name
        multiArrayConstraint = array
        stateConstraint = state
    }
}

/// The form of an array.
public class MLMultiArrayConstraint {
    /// Its extents.
    public let shape: [NSNumber]
    /// The kind of its numbers.
    public let dataType: MLMultiArrayDataType

    init(_ tensor: Manifest.TensorFacts) {
        shape = tensor.shape.map { NSNumber(value: $0) }
        dataType = MLMultiArrayDataType(tensor.type)
    }
}

/// The form of a state.
public class MLStateConstraint {
    /// Its extents.
    public let bufferShape: [Int]
    /// The kind of its numbers.
    public let dataType: MLMultiArrayDataType

    init(_ tensor: Manifest.TensorFacts) {
        bufferShape = tensor.shape
        dataType = MLMultiArrayDataType(tensor.type)
    }
}

/// The kinds of numbers in an array.
public enum MLMultiArrayDataType: Int, Sendable {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104

    init(_ kind: Manifest.TensorFacts.Kind) {
        switch kind {
        case .int32: self = .int32
        case .float16: self = .float16
        case .float32: self = .float32
        }
    }

    /// Bytes of one number.
    var size: Int {
        switch self {
        case .double: return 8
        case .float32, .int32: return 4
        case .float16: return 2
        }
    }
}
