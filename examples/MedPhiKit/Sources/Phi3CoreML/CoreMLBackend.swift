#if canImport(CoreML)
    import Foundation
    import Phi3Core

    /// How a package is loaded into Core ML.
    public struct CoreMLOptions: Sendable {
        /// The units to run on and no others; `nil`: those the bundle recommends, and others where
        /// they do not take it.
        public var units: Manifest.CoreMLFacts.Units?
        /// Where compiled packages are kept; `nil`: the app's own folder for such files.
        public var cacheFolder: URL?
        /// The system's version and build; a package compiled under another is compiled again.
        var system = ProcessInfo.processInfo.operatingSystemVersionString

        /// Options that leave the choice to the bundle.
        public init(units: Manifest.CoreMLFacts.Units? = nil, cacheFolder: URL? = nil) {
            self.units = units
            self.cacheFolder = cacheFolder
        }
    }

    /// A bundle's package in Core ML.
    ///
    /// One state holds keys and values, and one adapter is on the package at a time. What is common
    /// with the sequence before is read again from the state; a sequence under another adapter, or on
    /// the other side of LongRoPE's switch, is read from its beginning.
    public final class CoreMLBackend: TokenBackend {
        /// What it is and what it can hold.
        public let facts: BackendFacts

        private let bundle: ModelBundle
        private let shape: PackageShape
        private let options: CoreMLOptions
        private let engine: CoreMLEngine
        private let packages: CompiledPackages

        /// A backend with nothing in memory yet.
        ///
        /// - Parameters:
        ///   - bundle: an opened bundle.
        ///   - options: how it is loaded.
        public init(bundle: ModelBundle, options: CoreMLOptions = CoreMLOptions()) {
            self.bundle = bundle
            self.options = options
            shape = PackageShape(bundle.manifest)
            facts = CoreMLBackend.facts(bundle.manifest)
            engine = CoreMLEngine(shape, target: facts.target)
            packages = CompiledPackages(
                bundle, folder: options.cacheFolder ?? CoreMLBackend.usualFolder,
                system: options.system)
        }

        /// The units the package was loaded on; `nil`: it is not loaded.
        public var loadedUnits: Manifest.CoreMLFacts.Units? {
            get async { await engine.package?.units }
        }

        /// The compiled package and its units; `nil`: it is not loaded.
        var loadedPackage: (url: URL, units: Manifest.CoreMLFacts.Units)? {
            get async { await engine.package }
        }

        /// The base's function that reads one id.
        var decodeFunction: String { shape.base.decode }

        /// Compiles the package where that was not done yet, and loads its functions.
        ///
        /// - Parameter report: is told what goes on.
        /// - Throws: `Phi3Error`: it cannot be compiled or loaded, or it is not what the manifest says.
        public func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws {
            if await engine.package != nil { return }
            try PackageContract.check(bundle)
            let place = try await packages.place(report)
            try Task.checkCancellation()
            report(place.isNew ? .specializing : .loading)
            do {
                try await engine.load(place.url, units: units)
            } catch let error as Phi3Error {
                guard case .modelLoad = error, place.isOurs, !place.isNew,
                    try await packages.forget()
                else { throw error }
                // What was kept may be damaged; a new one tells.
                let fresh = try await packages.place(report)
                report(.specializing)
                try await engine.load(fresh.url, units: units)
            }
        }

        /// The logits after the last of all ids; loads the package where it is not loaded.
        ///
        /// - Parameters:
        ///   - ids: all of the sequence.
        ///   - adapter: what is to be on the package; `nil`: the base.
        public func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] {
            while true {
                try Task.checkCancellation()
                if let logits = try await engine.logits(after: ids, adapter: adapter) {
                    return logits
                }
                try await load { _ in }
            }
        }

        /// Gives memory back; what was compiled is kept.
        public func unload() async { await engine.unload() }

        /// Writes the bundle to a new place, with the adapter among its own.
        ///
        /// - Parameters:
        ///   - url: the bundle to write; it appears complete or not at all.
        ///   - adapter: what is on the package; `nil`: the base.
        ///   - replace: whether a bundle that is there is replaced.
        public func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {
            try await engine.copy(bundle, to: url, adding: adapter, replace: replace)
        }

        private var units: [Manifest.CoreMLFacts.Units] {
            if let units = options.units { return [units] }
            var choices = [bundle.manifest.medphi.coreml.recommendedUnits]
            for other in [Manifest.CoreMLFacts.Units.cpuAndGPU, .all, .cpuOnly]
            where !choices.contains(other) {
                choices.append(other)
            }
            return choices
        }

        private static func facts(_ manifest: Manifest) -> BackendFacts {
            let ours = manifest.medphi
            let support: BackendFacts.AdapterSupport
            switch ours.adapters.mode {
            case .slots: support = .any
            case .functions:
                support = .builtIn(
                    ours.adapters.list.filter { !$0.functions.isEmpty }.map(\.name))
            case .fused: support = .none("an adapter is folded into the package's weights")
            case .none: support = .none("the package was exported without room for adapters")
            }
            return BackendFacts(
                name: "core-ml", contextLength: ours.coreml.contextLength,
                vocabularyRows: ours.model.vocabSize, adapterSupport: support,
                target: AdapterTarget(manifest),
                memory: MemoryNeeds(
                    weights: ours.memory.weights, keyValuePerToken: ours.memory.kvPerToken,
                    adapters: ours.memory.adapterSlots, takesWholeContext: true))
        }

        private static var usualFolder: URL {
            let files = FileManager.default
            let support = files.urls(for: .applicationSupportDirectory, in: .userDomainMask).first
            return (support ?? files.temporaryDirectory)
                .appendingPathComponent("MedPhiKit/Compiled", isDirectory: true)
        }
    }
#endif
