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

        @Test func anotherSystemOrManifestCompilesAnewAndRemovesTheOld() async throws {
            let rig = try Rig(small)
            try await rig.backend.load { _ in }
            let first = try entries(rig)
            let left = rig.folder["compiled/.x.medphi-unfinished"]
            try FileManager.default.createDirectory(at: left, withIntermediateDirectories: true)
            let other = rig.folder["compiled/other.txt"]
            try Data().write(to: other)
            try await Rig.backend(rig.bundle, rig.folder, system: "system 2").load { _ in }
            let second = try entries(rig)
            #expect(second.count == 2 && second.contains("other.txt"))
            #expect(Set(first).isDisjoint(with: second))
            let newer = try BundleMaker(context: 48, width: 16).make(in: rig.folder)
            try await Rig.backend(newer, rig.folder, system: "system 2").load { _ in }
            #expect(try entries(rig).count == 2)
            #expect(Set(second).intersection(try entries(rig)) == ["other.txt"])
            // A model of another name has a place of its own.
            let beside = try BundleMaker(name: "beside", context: 48, width: 16)
                .make(in: rig.folder)
            try await Rig.backend(beside, rig.folder, system: "system 2").load { _ in }
            #expect(try entries(rig).count == 3)
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
