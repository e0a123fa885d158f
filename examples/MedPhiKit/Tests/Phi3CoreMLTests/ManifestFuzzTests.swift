#if canImport(CoreML)
    import Foundation
    import Phi3Reference
    import Testing

    @testable import Phi3Core
    @testable import Phi3CoreML

    /// Manifests that lie about numbers must end in an error, or in a backend that knows its needs.
    @Suite struct ManifestFuzzTests {
        private static let extents = [
            "vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads",
            "head_dim", "max_position_embeddings", "sliding_window",
        ]
        private static let others: [[String]] = [
            ["medphi", "coreml", "context_length"], ["medphi", "coreml", "prefill_width"],
            ["medphi", "coreml", "mask_value"], ["medphi", "adapters", "rank_slot"],
            ["medphi", "memory", "weights"], ["medphi", "memory", "kv_per_token"],
            ["medphi", "memory", "adapter_slots"], ["medphi", "model", "rope", "rotary_dim"],
            ["medphi", "model", "rope", "switch_length"], ["medphi", "model", "rope", "theta"],
        ]
        private static let values: [JSONValue] =
            [0, 1, 2, 16, 4096, 10_000, 65_536, 1 << 24, (1 << 30) - 1, 1 << 30, (1 << 31) - 1]
            .map { .integer($0) }
            + [.integer(1 << 31), .integer(1 << 53), .integer(.max), .number(1e308), .null]

        private let manifest: JSONValue

        init() throws {
            let folder = try TestFolder()
            let maker = BundleMaker(context: 32, width: 16, adapters: .slots(.state))
            manifest = try FileBytes.json(try maker.make(in: folder).place(Manifest.fileName))
        }

        private static func set(
            _ value: JSONValue, _ path: ArraySlice<String>, _ new: JSONValue
        ) -> JSONValue {
            guard let name = path.first, var members = value.object else { return new }
            members[name] = set(members[name] ?? .null, path.dropFirst(), new)
            return .object(members)
        }

        private func opened(_ changes: [([String], JSONValue)]) throws -> ModelBundle {
            let changed = changes.reduce(manifest) { Self.set($0, $1.0[...], $1.1) }
            return ModelBundle(
                url: URL(fileURLWithPath: "/x.medphi"), manifest: try Manifest.parse(changed),
                manifestSHA256: "")
        }

        private static func model(_ name: String, _ value: JSONValue) -> ([String], JSONValue) {
            (["medphi", "model", name], value)
        }

        private func plan(_ facts: BackendFacts) {
            let plan = MemoryPlan(
                facts.memory, context: facts.contextLength, available: 1 << 30)
            #expect(plan.needed >= 0)
        }

        @Test func weightsThatLeaveSixtyFourBitsAreRefused() throws {
            let most = JSONValue.integer((1 << 31) - 1)
            let bundle = try opened([
                Self.model("hidden_size", most), Self.model("heads", .integer(1)),
                Self.model("kv_heads", .integer(1)), Self.model("head_dim", most),
                Self.model("intermediate_size", .integer((1 << 30) - 1)),
            ])
            let error = #expect(throws: Phi3Error.self) { try ReferenceBackend(bundle) }
            #expect(error?.description.contains("describes no Phi-3") == true)
            let backend = CoreMLBackend(bundle: bundle)
            plan(backend.facts)
            #expect(!PackageShape(bundle.manifest).problems().isEmpty)
        }

        @Test func numbersThatLieNeverCrash() throws {
            var state: UInt64 = 5
            func random(_ count: Int) -> Int {
                state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                return Int((state >> 33) % UInt64(count))
            }
            let times =
                ProcessInfo.processInfo.environment["MEDPHI_FUZZ"].flatMap { Int($0) } ?? 1
            var (accepted, refused) = (0, 0)
            for _ in 0..<2000 * times {
                var changes: [([String], JSONValue)] = []
                for _ in 0...random(6) {
                    let value = Self.values[random(Self.values.count)]
                    let number = random(Self.extents.count + Self.others.count / 2)
                    guard number < Self.extents.count else {
                        changes.append((Self.others[random(Self.others.count)], value))
                        continue
                    }
                    changes.append(Self.model(Self.extents[number], value))
                    if number == 0 { changes.append((["language", "vocab_size"], value)) }
                }
                do {
                    let bundle = try opened(changes)
                    plan(CoreMLBackend(bundle: bundle).facts)
                    _ = PackageShape(bundle.manifest).problems()
                    plan(try ReferenceBackend(bundle).facts)
                    accepted += 1
                } catch {
                    #expect((error as? Phi3Error)?.details.advice.isEmpty == false)
                    refused += 1
                }
            }
            #expect(accepted > 100 && refused > 100)
        }
    }
#endif
