#if canImport(CoreML) && !os(Linux)
    @preconcurrency import CoreML
    import Foundation
    import Phi3Core

    /// On which units Core ML means to run a function's operations.
    ///
    /// This file is compiled on Apple's systems only and was never run: there was no Mac.
    public struct ComputePlanAudit: Sendable, Equatable {
        /// Operations on the processor.
        public var processor = 0
        /// Operations on the graphics unit.
        public var graphics = 0
        /// Operations on the Neural Engine.
        public var neuralEngine = 0
        /// Operations that Core ML says nothing of, such as constants.
        public var unassigned = 0

        /// Asks Core ML for its plan of a compiled package.
        ///
        /// - Parameters:
        ///   - url: the compiled package.
        ///   - function: one of its functions.
        ///   - units: the units it is loaded on.
        /// - Returns: `nil` where Core ML gives no plan of such a function.
        static func make(
            _ url: URL, function: String, units: Manifest.CoreMLFacts.Units
        ) async throws -> ComputePlanAudit? {
            let configuration = MLModelConfiguration()
            configuration.functionName = function
            configuration.computeUnits = units.computeUnits
            let plan = try await MLComputePlan.load(contentsOf: url, configuration: configuration)
            guard case .program(let program) = plan.modelStructure,
                let found = program.functions[function] ?? program.functions["main"]
            else { return nil }
            var audit = ComputePlanAudit()
            audit.count(found.block, plan)
            return audit
        }

        private mutating func count(
            _ block: MLModelStructure.Program.Block, _ plan: MLComputePlan
        ) {
            for operation in block.operations {
                switch plan.deviceUsage(for: operation)?.preferred {
                case .cpu: processor += 1
                case .gpu: graphics += 1
                case .neuralEngine: neuralEngine += 1
                default: unassigned += 1
                }
                for inner in operation.blocks { count(inner, plan) }
            }
        }
    }

    extension CoreMLBackend {
        /// On which units the base's decode function is to run; `nil`: Core ML does not say.
        ///
        /// - Throws: `Phi3Error`, or Core ML's own error where it cannot plan.
        public func computePlan() async throws -> ComputePlanAudit? {
            try await load { _ in }
            guard let (url, units) = await loadedPackage else { return nil }
            return try await ComputePlanAudit.make(
                url, function: decodeFunction, units: units)
        }
    }
#endif
