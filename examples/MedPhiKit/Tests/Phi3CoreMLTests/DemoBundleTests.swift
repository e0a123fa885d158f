#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Phi3Reference
    import Testing

    @testable import Phi3CoreML

    /// Tests with a bundle that was exported, e.g. by `medphi demo`: its own package and adapters.
    @Suite(
        .enabled(
            if: Fixtures.demo != nil, "MEDPHI_DEMO_BUNDLE names no bundle that was exported"))
    struct DemoBundleTests {
        private func opened() throws -> (ModelBundle, CoreMLBackend, TestFolder) {
            let folder = try TestFolder()
            let bundle = try ModelBundle.open(try #require(Fixtures.demo))
            return (bundle, Rig.backend(bundle, folder), folder)
        }

        @Test func everyAdapterGivesWhatTheProcessorGives() async throws {
            let (bundle, backend, folder) = try opened()
            defer { _ = folder }
            let base = try ReferenceModel(bundle)
            let most = min(bundle.manifest.medphi.coreml.contextLength, 100)
            let ids = Fixtures.ids(most, below: UInt64(bundle.manifest.medphi.model.vocabSize))
            let before = try await backend.logits(after: ids, adapter: nil)
            #expect(difference(before, try reference(ids, base)) < halfPrecision)
            for (name, url) in bundle.adapters {
                let adapter = try Adapter.load(url, for: backend.facts.target)
                let bound = BoundAdapter(adapter, name: name)
                let found = try await backend.logits(after: ids, adapter: bound)
                #expect(
                    difference(found, try reference(ids, try base.applying(adapter)))
                        < halfPrecision)
            }
            #expect(try await backend.logits(after: ids, adapter: nil) == before)
            #expect(TestBench.of(package: bundle.package).notes == [])
        }
    }
#endif
