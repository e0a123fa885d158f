#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Phi3Reference
    import Testing

    @testable import Phi3CoreML

    @Suite struct FailureTests {
        private let small = BundleMaker(context: 96, width: 16, adapters: .slots(.state))

        @Test func aCancelledPromptStopsBetweenBlocksAndKeepsWhatWasRead() async throws {
            let rig = try Rig(small)
            let ids = Fixtures.ids(80)
            rig.bench.faults.onPrediction = { call in
                if call.position == 32 { withUnsafeCurrentTask { $0?.cancel() } }
            }
            let task = Task { try await rig.backend.logits(after: ids, adapter: nil) }
            await #expect(throws: CancellationError.self) { try await task.value }
            #expect(rig.calls() == ["prefill 0", "prefill 16", "prefill 32"])
            rig.bench.faults.onPrediction = nil
            let found = try await rig.backend.logits(after: ids, adapter: nil)
            #expect(rig.calls() == ["prefill 48", "prefill 64"])
            #expect(
                difference(found, try reference(ids, try RuntimeTests.mini.get())) < halfPrecision)
        }

        @Test(arguments: 0..<3) func aFailedPredictionIsForgotten(after count: Int) async throws {
            let rig = try Rig(small)
            let ids = Fixtures.ids(40)
            let wanted = try await rig.backend.logits(after: ids, adapter: nil)
            await rig.backend.unload()
            rig.bench.faults.predictionsUntilFailure = count
            let error = await failure { _ = try await rig.backend.logits(after: ids, adapter: nil) }
            guard case .modelLoad(let details) = error else {
                return #expect(error == nil, "no error of the package")
            }
            #expect(details.found.contains("-14"))
            #expect(try await rig.backend.logits(after: ids, adapter: nil) == wanted)
        }

        @Test func otherUnitsAreTriedInOrder() async throws {
            let rig = try Rig(small)
            rig.bench.faults.refusedUnits = [MLComputeUnits.cpuAndGPU.rawValue]
            try await rig.backend.load { _ in }
            #expect(await rig.backend.loadedUnits == .all)
            let only = Rig.backend(rig.bundle, rig.folder, units: .cpuAndGPU)
            let error = await failure { try await only.load { _ in } }
            guard case .modelLoad(let details) = error else {
                return #expect(error == nil, "it loaded")
            }
            #expect(details.found.contains("cpu_and_gpu") && !details.found.contains("all:"))
        }

        @Test func aLoadThatFailsCanBeTriedAgain() async throws {
            let rig = try Rig(small)
            rig.bench.faults.refusedFunctions = ["decode"]
            for _ in 0..<2 {
                let error = await failure { try await rig.backend.load { _ in } }
                guard case .modelLoad = error else { return #expect(error == nil, "it loaded") }
            }
            #expect(await rig.backend.loadedUnits == nil)
            rig.bench.faults.refusedFunctions = []
            _ = try await rig.backend.logits(after: [1, 2, 3], adapter: nil)
        }

        @Test func aPackageThatDoesNotCompileSaysSo() async throws {
            let rig = try Rig(small)
            rig.bench.faults.compileFails = true
            let error = await failure { try await rig.backend.load { _ in } }
            guard case .modelLoad(let details) = error else {
                return #expect(error == nil, "it compiled")
            }
            #expect(details.place == rig.bundle.package.path)
            rig.bench.faults.compileFails = false
            try await rig.backend.load { _ in }
        }

        @Test func aMissingPackageIsNamed() async throws {
            let rig = try Rig(small)
            try FileManager.default.removeItem(at: rig.bundle.package)
            let error = await failure { try await rig.backend.load { _ in } }
            guard case .file(let details) = error else { return #expect(error == nil, "it loaded") }
            #expect(details.place == rig.bundle.package.path)
        }

        /// Sets a value of the manifest by its path.
        private static func set(
            _ path: [String], _ value: JSONValue, in object: inout JSONObject
        ) {
            guard let name = path.first else { return }
            guard path.count > 1, var inner = object[name]?.object else {
                object[name] = value
                return
            }
            set(Array(path.dropFirst()), value, in: &inner)
            object[name] = .object(inner)
        }

        @Test func aManifestThatLiesAboutThePackageIsFoundOut() async throws {
            // The manifest of a model with another vocabulary and context, in agreement with itself.
            let other = Fixtures.phi3.appendingPathComponent("gqa")
            let folder = try TestFolder()
            let lie = try BundleMaker(
                checkpoint: other, context: 64, width: 16, adapters: .slots(.state)
            ).make(in: folder)
            let text = try FileBytes.json(lie.place(Manifest.fileName))
            let rig = try Rig(small) { $0 = text.object ?? $0 }
            let error = await failure { try await rig.backend.load { _ in } }
            guard case .schemaMismatch(let list) = error else {
                return #expect(error == nil, "it loaded")
            }
            #expect(
                list.problems.contains {
                    $0.hasPrefix("prefill input causalMask: float16 (1, 1, 16, 96) in the package")
                })
            #expect(list.problems.contains { $0.hasPrefix("decode state keyCache") })
            #expect(rig.bench.calls.isEmpty)
        }

        @Test(arguments: [
            (["medphi", "coreml", "context_length"], 128),
            (["medphi", "model", "vocab_size"], 321),
            (["medphi", "model", "head_dim"], 8), (["medphi", "adapters", "rank_slot"], 8),
            (["medphi", "coreml", "prefill_width"], 32), (["medphi", "model", "layers"], 1 << 50),
        ]) func aManifestThatContradictsItselfIsNotLoaded(path: [String], value: Int) async throws {
            let rig = try Rig(small) { Self.set(path, .integer(value), in: &$0) }
            let error = await failure { try await rig.backend.load { _ in } }
            guard case .schemaMismatch(let list) = error else {
                return #expect(error == nil, "it loaded")
            }
            #expect(!list.problems.isEmpty && !list.advice.isEmpty)
            #expect(rig.bench.loads.isEmpty)
        }
    }
#endif
