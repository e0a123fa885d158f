#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Synchronization
    import Testing

    @testable import Phi3CoreML

    @Suite struct CompiledPackagesTests {
        private let small = BundleMaker(context: 32, width: 16)

        private func entries(_ rig: Rig) throws -> [String] {
            try FileManager.default.contentsOfDirectory(atPath: rig.folder["compiled"].path)
        }

        private func events(of backend: CoreMLBackend) async throws -> [LoadEvent] {
            let events = Mutex<[LoadEvent]>([])
            try await backend.load { event in events.withLock { $0.append(event) } }
            return events.withLock { $0 }
        }

        @Test func aPackageIsCompiledOnce() async throws {
            let rig = try Rig(small)
            #expect(try await events(of: rig.backend) == [.compiling, .specializing])
            #expect(try await events(of: rig.backend) == [])
            let again = Rig.backend(rig.bundle, rig.folder)
            #expect(try await events(of: again) == [.loading])
            #expect(rig.bench.compilations == 1)
            #expect(try entries(rig).count == 1)
        }

        @Test func bundlesOfOneNameKeepTheirPackages() async throws {
            let rig = try Rig(small)
            try await rig.backend.load { _ in }
            // Another bundle of the same name, another system, and a bundle of another name.
            let newer = try BundleMaker(context: 48, width: 16).make(in: rig.folder)
            let beside = try BundleMaker(name: "beside", context: 48, width: 16)
                .make(in: rig.folder)
            let others = [
                Rig.backend(newer, rig.folder), Rig.backend(beside, rig.folder),
                Rig.backend(rig.bundle, rig.folder, system: "system 2"),
            ]
            for (number, backend) in others.enumerated() {
                #expect(try await events(of: backend) == [.compiling, .specializing])
                #expect(try entries(rig).count == number + 2)
            }
            await rig.backend.unload()
            #expect(try await events(of: rig.backend) == [.loading])
            #expect(try await events(of: Rig.backend(newer, rig.folder)) == [.loading])
        }

        /// What lies there was made by processes of other days.
        @Test func whatNobodyUsesIsRemoved() async throws {
            let rig = try Rig(small)
            try await rig.backend.load { _ in }
            let entry = try #require(try entries(rig).first)
            let parts = entry.split(separator: "-").map(String.init)
            try #require(parts.count == 4)
            let day: TimeInterval = 86_400
            func made(_ name: String, daysAgo: Double) throws -> String {
                let place = rig.folder["compiled/\(name)"]
                try FileManager.default.createDirectory(
                    at: place, withIntermediateDirectories: true)
                try FileManager.default.setAttributes(
                    [.modificationDate: Date(timeIntervalSinceNow: -daysAgo * day)],
                    ofItemAtPath: place.path)
                return name
            }
            func name(_ model: String, _ hash: String, _ system: String) -> String {
                "medphi-\(model)-\(hash)-\(system)"
            }
            let hash = String(parts[2].reversed())
            let kept = [
                entry, try made(name(parts[1], hash, parts[3]), daysAgo: 29),
                try made(name("000000000000", hash, parts[3]), daysAgo: 400),
                try made(".a.medphi-unfinished", daysAgo: 0.9),
                try made("medphi-other", daysAgo: 400), try made("x.mlmodelc", daysAgo: 400),
            ]
            _ = try made(name(parts[1], "\(hash)0", parts[3]), daysAgo: 31)
            _ = try made(name("000000000000", hash, "00000000.mlmodelc"), daysAgo: 0)
            _ = try made(".b.medphi-unfinished", daysAgo: 1.1)
            _ = try made(entry, daysAgo: 50)
            #expect(try await events(of: Rig.backend(rig.bundle, rig.folder)) == [.loading])
            #expect(try entries(rig).sorted() == kept.sorted())
            let facts = try FileManager.default.attributesOfItem(
                atPath: rig.folder["compiled/\(entry)"].path)
            let used = try #require(facts[.modificationDate] as? Date)
            #expect(used.timeIntervalSinceNow > -day)
        }

        @Test func aCancelledCallerLeavesTheCompilationToTheNext() async throws {
            let rig = try Rig(small)
            let (gate, opening) = AsyncStream.makeStream(of: Void.self)
            rig.bench.faults.onCompilation = { for await _ in gate {} }
            let caller = Task { try await rig.backend.load { _ in } }
            while rig.bench.compilations == 0 { try await Task.sleep(nanoseconds: 1_000_000) }
            let next = Task { try await rig.backend.load { _ in } }
            caller.cancel()
            await #expect(throws: CancellationError.self) { try await caller.value }
            // It did not wait: nothing is there yet.
            #expect(FileBytes.kind(of: rig.folder["compiled"]) == .missing)
            opening.finish()
            try await next.value
            #expect(rig.bench.compilations == 1)
            #expect(try entries(rig).count == 1)
            _ = try await rig.backend.logits(after: [1, 2], adapter: nil)
        }

        @Test func aDamagedCopyIsMadeAgain() async throws {
            let rig = try Rig(small)
            try await rig.backend.load { _ in }
            await rig.backend.unload()
            let entry = try #require(try entries(rig).first)
            try FileManager.default.removeItem(
                at: rig.folder["compiled/\(entry)/\(Manifest.fileName)"])
            #expect(try await events(of: rig.backend) == [.loading, .compiling, .specializing])
            _ = try await rig.backend.logits(after: [1, 2], adapter: nil)
        }

        @Test func aCompiledPackageBesideIsTaken() async throws {
            let rig = try Rig(small)
            let made = try await MLModel.compileModel(at: rig.bundle.package)
            try FileManager.default.moveItem(
                at: made, to: rig.bundle.place("model/Phi3.mlmodelc"))
            #expect(try await events(of: rig.backend) == [.loading])
            #expect(rig.bench.compilations == 1)
        }

        @Test func aFolderThatCannotBeWrittenIsNamed() async throws {
            let rig = try Rig(small)
            try Data().write(to: rig.folder["compiled"])
            let error = await failure { try await rig.backend.load { _ in } }
            guard case .file(let details) = error else { return #expect(error == nil, "it loaded") }
            #expect(details.place == rig.folder["compiled"].path)
        }
    }
#endif
