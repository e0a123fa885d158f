/// Features by name.
public protocol MLFeatureProvider {
    /// The names.
    var featureNames: Set<String> { get }
    /// One feature; `nil`: there is none of this name.
    func featureValue(for featureName: String) -> MLFeatureValue?
}

/// One feature.
public class MLFeatureValue {
    /// The array it is.
    public let multiArrayValue: MLMultiArray?

    /// A feature that is an array.
    public init(multiArray value: MLMultiArray) { multiArrayValue = value }
}

/// Features in a dictionary.
public class MLDictionaryFeatureProvider: MLFeatureProvider {
    private let features: [String: MLFeatureValue]

    /// Takes features by name.
    public init(dictionary: [String: Any]) throws {
        features = try dictionary.mapValues {
            guard let value = $0 as? MLFeatureValue else {
                throw failure(1, "a feature is no MLFeatureValue")
            }
            return value
        }
    }

    /// The names.
    public var featureNames: Set<String> { Set(features.keys) }

    /// One feature.
    public func featureValue(for featureName: String) -> MLFeatureValue? { features[featureName] }
}
