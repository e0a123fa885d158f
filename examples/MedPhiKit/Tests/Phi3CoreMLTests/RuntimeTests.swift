#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Phi3Reference
    import Testing

    @testable import Phi3CoreML

    /// A bundle of the test module with its backend and what the module saw of it.
    struct Rig {
        let folder: TestFolder
        let bundle: ModelBundle
        let backend: CoreMLBackend
        let bench: TestBench

        init(
            _ maker: BundleMaker = BundleMaker(), units: Manifest.CoreMLFacts.Units? = nil,
            change: (inout JSONObject) -> Void = { _ in }
        ) throws {
            folder = try TestFolder()
            bundle = try maker.make(in: folder, change: change)
            backend = Rig.backend(bundle, folder, units: units)
            bench = TestBench.of(package: bundle.package)
        }

        static func backend(
            _ bundle: ModelBundle, _ folder: TestFolder,
            units: Manifest.CoreMLFacts.Units? = nil, system: String = "system 1"
        ) -> CoreMLBackend {
            var options = CoreMLOptions(units: units, cacheFolder: folder["compiled"])
            options.system = system
            return CoreMLBackend(bundle: bundle, options: options)
        }

        /// Predictions since the last call of this, as "function position".
        func calls() -> [String] {
            defer { bench.clear() }
            return bench.calls.map { "\($0.function) \($0.position)" }
        }
    }

    @Suite struct RuntimeTests {
        static let mini = Result { try ReferenceModel.load(Fixtures.mini) }

        @Test(arguments: [1, 2, 63, 64, 65, 128, 142, 143, 144])
        func logitsAreTheProcessorBackends(length: Int) async throws {
            let rig = try Rig(BundleMaker(context: 144))
            let ids = Fixtures.ids(length)
            let found = try await rig.backend.logits(after: ids, adapter: nil)
            let wanted = try reference(ids, try Self.mini.get())
            #expect(difference(found, wanted) < halfPrecision)
            #expect(rig.bench.notes == [])
        }

        @Test func decodingStepByStepGivesWhatReadingAtOnceGives() async throws {
            let rig = try Rig()
            let model = try Self.mini.get()
            var ids = Fixtures.ids(60)
            for _ in 0..<12 {
                let found = try await rig.backend.logits(after: ids, adapter: nil)
                let wanted = try reference(ids, model)
                #expect(difference(found, wanted) < halfPrecision)
                let best = try #require(found.indices.max { found[$0] < found[$1] })
                #expect(best == wanted.indices.max { wanted[$0] < wanted[$1] })
                ids.append(Int32(best))
            }
            #expect(rig.calls() == ["prefill 0"] + (60..<71).map { "decode \($0)" })
        }

        @Test(arguments: ["gqa", "partial-rotary-tied"])
        func otherArchitecturesToo(name: String) async throws {
            let checkpoint = Fixtures.phi3.appendingPathComponent(name)
            let rig = try Rig(BundleMaker(checkpoint: checkpoint, context: 64, width: 16))
            let ids = Fixtures.ids(37)
            let found = try await rig.backend.logits(after: ids, adapter: nil)
            let wanted = try reference(ids, try ReferenceModel.load(checkpoint))
            #expect(difference(found, wanted) < halfPrecision)
        }

        @Test func theEndOfTheContextIsReadIdByIdAndNotPassed() async throws {
            let rig = try Rig(BundleMaker(context: 40, width: 16))
            let ids = Fixtures.ids(41)
            _ = try await rig.backend.logits(after: Array(ids[..<40]), adapter: nil)
            #expect(
                rig.calls() == ["prefill 0", "prefill 16"] + (32..<40).map { "decode \($0)" })
            let error = await failure { _ = try await rig.backend.logits(after: ids, adapter: nil) }
            guard case .contextOverflow = error else { return #expect(error == nil, "no overflow") }
            #expect(rig.calls() == [])
        }

        @Test func whatIsCommonIsNotReadAgain() async throws {
            let rig = try Rig(BundleMaker(context: 96, width: 16))
            let ids = Fixtures.ids(40)
            _ = try await rig.backend.logits(after: ids, adapter: nil)
            #expect(rig.calls() == ["prefill 0", "prefill 16", "prefill 32"])
            // One more, the same again, another end, a shorter one, another beginning.
            let model = try Self.mini.get()
            let other = Fixtures.ids(20, seed: 9)
            let steps: [([Int32], [String])] = [
                (ids + [7], ["decode 40"]), (ids + [7], ["decode 40"]),
                (Array(ids[..<30]) + other, ["prefill 30", "prefill 46"]),
                (Array(ids[..<12]), ["decode 11"]), (Array(ids[..<20]), ["prefill 12"]),
                (other, ["prefill 0", "prefill 16"]),
            ]
            for (sequence, calls) in steps {
                let found = try await rig.backend.logits(after: sequence, adapter: nil)
                #expect(rig.calls() == calls)
                #expect(difference(found, try reference(sequence, model)) < halfPrecision)
            }
        }

        @Test func aSlidingWindowHidesOldKeys() async throws {
            let checkpoint = Fixtures.phi3.appendingPathComponent("sliding-window")
            let rig = try Rig(BundleMaker(checkpoint: checkpoint, context: 64, width: 16))
            let model = try ReferenceModel.load(checkpoint)
            var ids = Fixtures.ids(45)
            for _ in 0..<3 {
                let found = try await rig.backend.logits(after: ids, adapter: nil)
                #expect(difference(found, try reference(ids, model)) < halfPrecision)
                ids.append(3)
            }
        }

        @Test func longRoPEReadsAllAgainWhereItSwitches() async throws {
            // Its switch is at 32 tokens.
            let checkpoint = Fixtures.phi3.appendingPathComponent("longrope-long")
            let rig = try Rig(BundleMaker(checkpoint: checkpoint, context: 64, width: 16))
            let model = try ReferenceModel.load(checkpoint)
            let ids = Fixtures.ids(35)
            for (length, calls) in [
                (31, ["prefill 0", "prefill 16"]), (32, ["decode 31"]),
                (33, ["prefill 0", "prefill 16", "decode 32"]), (34, ["decode 33"]),
                (20, ["prefill 0", "prefill 16"]), (35, ["prefill 0", "prefill 16", "prefill 32"]),
            ] {
                let sequence = Array(ids[..<length])
                let found = try await rig.backend.logits(after: sequence, adapter: nil)
                #expect(rig.calls() == calls)
                #expect(difference(found, try reference(sequence, model)) < halfPrecision)
            }
        }

        @Test func idsOutsideTheVocabularyNeverReachThePackage() async throws {
            let rig = try Rig()
            for ids in [[], [-1], [5, 320], [Int32.min]] as [[Int32]] {
                let error = await failure {
                    _ = try await rig.backend.logits(after: ids, adapter: nil)
                }
                guard case .input = error else { return #expect(error == nil, "no input error") }
            }
            #expect(rig.calls() == [])
        }

        @Test func callersAtOnceDoNotMeet() async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16))
            rig.bench.faults.predictionDelay = 2000
            rig.bench.faults.compileDelay = 20_000_000
            let model = try Self.mini.get()
            let prompts = (0..<6).map { Fixtures.ids(20 + $0, seed: UInt64($0)) }
            try await withThrowingTaskGroup(of: ([Int32], [Float]).self) { group in
                for ids in prompts {
                    group.addTask { (ids, try await rig.backend.logits(after: ids, adapter: nil)) }
                }
                group.addTask {
                    await rig.backend.unload()
                    return ([], [])
                }
                for try await (ids, found) in group where !ids.isEmpty {
                    #expect(difference(found, try reference(ids, model)) < halfPrecision)
                }
            }
            #expect(rig.bench.notes == [])
            #expect(rig.bench.compilations == 1)
        }

        @Test func itWorksAfterUnloading() async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16))
            let ids = Fixtures.ids(20)
            let first = try await rig.backend.logits(after: ids, adapter: nil)
            #expect(await rig.backend.loadedUnits == .cpuAndGPU)
            await rig.backend.unload()
            #expect(await rig.backend.loadedUnits == nil)
            try await rig.backend.load { _ in }
            #expect(try await rig.backend.logits(after: ids, adapter: nil) == first)
        }

        @Test func theBundleIsCopiedAsItIs() async throws {
            let rig = try Rig(BundleMaker(context: 48, width: 16))
            let place = rig.folder["copy.medphi"]
            try await rig.backend.save(place, adapter: nil, replace: false)
            #expect(try ModelBundle.open(place).manifest == rig.bundle.manifest)
            await #expect(throws: Phi3Error.self) {
                try await rig.backend.save(place, adapter: nil, replace: false)
            }
        }

        @Test func factsAreTheManifests() throws {
            let facts = try Rig(BundleMaker(adapters: .slots(.state))).backend.facts
            #expect(facts.name == "core-ml" && facts.contextLength == 192)
            #expect(facts.vocabularyRows == 320 && facts.adapterSupport == .any)
            #expect(facts.memory.takesWholeContext)
            #expect(facts.memory.bytes(context: 192) == 1000 + 10 + 512 * 192)
            let built = try Rig(BundleMaker(adapters: .functions(["peft_0"]))).backend.facts
            #expect(built.adapterSupport == .builtIn(["peft_0"]))
        }
    }
#endif
