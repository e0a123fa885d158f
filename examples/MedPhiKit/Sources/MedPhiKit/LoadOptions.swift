import Foundation

/// What computes.
public enum BackendChoice: Sendable, Equatable, CaseIterable {
    /// Core ML for bundles on Apple's systems; the processor for everything else.
    case automatic
    /// Core ML: bundles on Apple's systems only.
    case coreML
    /// The processor alone, in single precision: for demo-size models, and to compare with.
    case reference
}

/// How a model is loaded.
public struct LoadOptions: Sendable {
    /// Whether all files of a bundle are hashed and its tokenizer is tried on the bundle's test cases.
    public var verify: Bool
    /// The most tokens of conversation and note together; `nil`: as many as the model has. A
    /// package's own number is fixed when it is exported.
    public var context: Int?
    /// The units that Core ML runs on; `nil`: those the bundle recommends.
    public var units: Manifest.CoreMLFacts.Units?
    /// Where packages that were compiled for this device are kept; `nil`: the app's own folder.
    public var cache: URL?
    /// Whether a model that does not fit into memory is refused before it is loaded.
    public var memoryCheck: Bool
    /// Whether Core ML may be another module of its name, as it is in tests on Linux.
    var allowsSubstitute = false

    /// Everything is checked, and the bundle decides.
    public init(
        verify: Bool = true, context: Int? = nil, units: Manifest.CoreMLFacts.Units? = nil,
        cache: URL? = nil, memoryCheck: Bool = true
    ) {
        self.verify = verify
        self.context = context
        self.units = units
        self.cache = cache
        self.memoryCheck = memoryCheck
    }
}
