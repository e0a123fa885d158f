import Foundation

/// A module of the name and the calls of Apple's Core ML, for Linux alone, so that the runtime loop is
/// compiled and tested here. It computes with the processor backend and looks at every call more
/// closely than Apple's does. What it says of Core ML itself is nothing.
///
/// Its classes are not `Sendable`, like the strictest reading of Apple's.
public class MLModel {
    /// What the loaded function takes, gives and keeps.
    public let modelDescription: MLModelDescription
    /// How it was loaded.
    public let configuration: MLModelConfiguration

    let package: CompiledPackage
    let function: PackageFunction

    /// Loads one function of a compiled package.
    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
        package = try CompiledPackage.open(url)
        let name = configuration.functionName
        try package.bench.willLoad(
            function: name ?? package.defaultFunction, units: configuration.computeUnits)
        function = try package.function(name ?? package.defaultFunction)
        modelDescription = MLModelDescription(function.signature)
        self.configuration = configuration
    }

    /// Loads one function of a compiled package.
    public class func load(
        contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()
    ) async throws -> MLModel {
        try MLModel(contentsOf: url, configuration: configuration)
    }

    /// Makes a compiled package in a temporary folder.
    public class func compileModel(at modelURL: URL) async throws -> URL {
        try await CompiledPackage.compile(modelURL)
    }

    /// New states, all zeros.
    public func makeState() -> MLState {
        MLState(package: package, states: function.signature.states)
    }

    /// Computes, after everything about the call was found right.
    public func prediction(
        from inputFeatures: any MLFeatureProvider, using state: MLState,
        options: MLPredictionOptions
    ) throws -> any MLFeatureProvider {
        try state.exclusively {
            let call = try PackageCall(inputFeatures, function, package, state)
            do {
                try package.bench.willPredict(call.record)
            } catch {
                state.spoil()
                throw error
            }
            let logits = try call.compute()
            return try MLDictionaryFeatureProvider(
                dictionary: ["logits": MLFeatureValue(multiArray: logits)])
        }
    }
}

/// How a function is loaded.
public class MLModelConfiguration {
    /// The function; `nil`: the package's default.
    public var functionName: String?
    /// The units it may run on.
    public var computeUnits: MLComputeUnits = .all

    /// All units and the default function.
    public init() {}
}

/// Units that a model may run on.
public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

/// Options of one prediction; none of them are used here.
public class MLPredictionOptions {
    /// The usual ones.
    public init() {}
}

/// An error as this module throws it, with Apple's domain.
func failure(_ code: Int, _ text: String) -> NSError {
    NSError(domain: "com.apple.CoreML", code: code, userInfo: [NSLocalizedDescriptionKey: text])
}
