import Foundation
import Testing

@testable import Phi3Core

@Suite("Installing bundles", StoreFixtures.limit)
struct StoreTests {
    private let server: StoreServer
    private let home: TestFolder

    init() throws {
        server = try StoreServer()
        home = try TestFolder()
    }

    private func serve(seed: UInt64) throws -> TestFolder {
        let bundle = try StoreFixtures.bundle(seed: seed)
        try server.serve(bundle, as: "b")
        return bundle
    }

    /// What an installation says went wrong.
    private func failure(_ store: BundleStore, _ address: URL? = nil) async -> String {
        do {
            _ = try await store.install("notes", from: address ?? server.url("b"))
            return "installed"
        } catch {
            return isReadable(error) ? "\(error)" : "unreadable: \(error)"
        }
    }

    @Test func aBundleIsInstalledOnceAndOpens() async throws {
        let bundle = try serve(seed: 1)
        let store = try StoreFixtures.store(home)
        let events = StoreEvents()
        let here = try await store.install("notes", from: server.url("b")) { events.add($0) }
        #expect(here.url.lastPathComponent == "notes.medphi" && !here.hasPrevious)
        #expect(try here.version == SHA256.hex(contentsOf: bundle["SHA256SUMS"]))
        _ = try ModelBundle.open(here.url)
        #expect(try await store.list() == [here])
        #expect(events.all.first == .listed(files: 5, bytes: 103_012))
        #expect(events.all.last == .installing)
        // Equal files are fetched once; the two small ones come first.
        let paths = server.takeRequests().map(\.path)
        #expect(paths.prefix(2) == ["/b/SHA256SUMS", "/b/metadata.json"] && paths.count == 7)
        #expect(!FileBytes.exists(home[".store/notes/arriving"].path))

        #expect(try await store.install("notes.medphi", from: server.url("b/")) == here)
        #expect(server.takeRequests().map(\.path) == ["/b/SHA256SUMS"])
        // Where the version is known, not even that is asked for.
        let again = try await store.install("notes", from: server.url("b"), version: here.version)
        #expect(again == here && server.takeRequests().isEmpty)
    }

    @Test func afterADropOnlyTheRestIsFetched() async throws {
        _ = try serve(seed: 1)
        let path = "b/\(StoreFixtures.weights)"
        server.fail(path, .drop(30_000), .drop(20_000))
        let events = StoreEvents()
        let store = try StoreFixtures.store(home)
        let here = try await store.install("notes", from: server.url("b")) { events.add($0) }
        _ = try ModelBundle.open(here.url)
        let requests = server.takeRequests().filter { $0.path == "/\(path)" }
        #expect(requests.map(\.start) == [nil, 30_000, 50_000])
        #expect(requests.map(\.sent) == [30_000, 20_000, 50_000])
        #expect(requests[1].ifRange?.hasPrefix("\"") == true)
        #expect(events.waits.count == 2)
    }

    @Test func anotherEntityTagStartsAgain() async throws {
        let old = try serve(seed: 1)
        let path = "b/\(StoreFixtures.weights)"
        for _ in 0..<3 { server.fail(path, .drop(10_000)) }
        // Each attempt brings something, so the store goes on; the tag changes under its feet.
        server.changeTags("x")
        let store = try StoreFixtures.store(home)
        server.fail(path, .status(404))
        #expect(await failure(store).contains("answered 404"))
        #expect(StoreFixtures.partials(home).values.map { $0 } == [30_000])
        server.changeTags("y")
        _ = server.takeRequests()
        _ = try await store.install("notes", from: server.url("b"))
        let requests = server.takeRequests().filter { $0.path == "/\(path)" }
        // Asked for the rest under the old tag, it sent all of it.
        #expect(requests.map(\.start) == [30_000] && requests.map(\.sent) == [100_000])
        #expect(
            FileManager.default.contentsEqual(
                atPath: old[StoreFixtures.weights].path,
                andPath: home["notes.medphi/\(StoreFixtures.weights)"].path))
    }

    @Test func wrongBytesAreRefusedAndTheOldVersionStays() async throws {
        _ = try serve(seed: 1)
        let store = try StoreFixtures.store(home)
        let old = try await store.install("notes", from: server.url("b"))
        _ = try serve(seed: 2)
        server.fail("b/\(StoreFixtures.weights)", .bytes(StoreFixtures.bytes(100_000, seed: 3)))
        let text = await failure(store)
        #expect(text.contains("another SHA-256") && text.contains(StoreFixtures.weights))
        #expect(try await store.installed("notes") == old)
        _ = try ModelBundle.open(old.url)
        #expect(StoreFixtures.partials(home).isEmpty)
    }

    @Test func wrongBytesFromBeforeAreFetchedAnew() async throws {
        _ = try serve(seed: 1)
        let path = "b/\(StoreFixtures.weights)"
        server.fail(path, .drop(30_000), .status(404))
        let store = try StoreFixtures.store(home)
        _ = await failure(store)
        let name = try #require(StoreFixtures.partials(home).keys.first)
        try StoreFixtures.bytes(30_000, seed: 9).write(to: home[".store/notes/arriving/\(name)"])
        _ = server.takeRequests()
        _ = try await store.install("notes", from: server.url("b"))
        let requests = server.takeRequests().filter { $0.path == "/\(path)" }
        #expect(requests.map(\.start) == [30_000, nil])
    }

    @Test func aFinishedFileThatWasSpoiledIsFetchedAnew() async throws {
        let bundle = try serve(seed: 1)
        server.fail("b/\(StoreFixtures.weights)", .status(404))
        let store = try StoreFixtures.store(home)
        _ = await failure(store)
        let adapter = "adapters/soap.safetensors"
        let hash = try SHA256.hex(contentsOf: bundle[adapter])
        #expect(FileBytes.size(of: home[".store/notes/arriving/\(hash)"]) == 3000)
        try StoreFixtures.bytes(3000, seed: 9).write(to: home[".store/notes/arriving/\(hash)"])
        _ = server.takeRequests()
        let here = try await store.install("notes", from: server.url("b"))
        #expect(server.takeRequests().contains { $0.path == "/b/\(adapter)" })
        _ = try ModelBundle.open(here.url)
    }

    @Test func aNewVersionFetchesWhatIsNewAndTheOldOneComesBack() async throws {
        _ = try serve(seed: 1)
        let store = try StoreFixtures.store(home)
        let old = try await store.install("notes", from: server.url("b"))
        _ = try serve(seed: 2)
        _ = server.takeRequests()
        let new = try await store.install("notes", from: server.url("b"))
        #expect(new.version != old.version && new.hasPrevious)
        #expect(
            server.takeRequests().map(\.path) == [
                "/b/SHA256SUMS", "/b/metadata.json", "/b/\(StoreFixtures.weights)",
            ])
        #expect(try await store.rollback("notes").version == old.version)
        _ = try ModelBundle.open(old.url)
        #expect(try await store.rollback("notes").version == new.version)

        // A version before that is altered is not put back.
        try home.write("x", ".store/notes/previous/\(StoreFixtures.weights)")
        await #expect(throws: Phi3Error.self) { try await store.rollback("notes") }
        #expect(try await store.installed("notes")?.version == new.version)
        try await store.remove("notes")
        #expect(try await store.list().isEmpty)
        await #expect(throws: Phi3Error.self) { try await store.rollback("notes") }
    }

    @Test func anInterruptedSwapIsEnded() async throws {
        _ = try serve(seed: 1)
        let store = try StoreFixtures.store(home)
        let old = try await store.install("notes", from: server.url("b"))
        _ = try serve(seed: 2)
        let new = try await store.install("notes", from: server.url("b"))
        let own = home[".store/notes"]
        func move(_ from: URL, _ to: URL) throws {
            try FileManager.default.moveItem(at: from, to: to)
        }
        // As a machine leaves it that stops between two renames of a rollback.
        try move(own.appendingPathComponent("previous"), own.appendingPathComponent("returning"))
        try move(new.url, own.appendingPathComponent("moving"))
        try await store.removePartial("notes")
        #expect(try await store.installed("notes") == new)
        #expect(try await store.rollback("notes").version == old.version)
        // As one leaves it that stops while a damaged version is replaced.
        try move(old.url, own.appendingPathComponent("damaged"))
        try await store.removePartial("notes")
        #expect(try await store.installed("notes")?.version == old.version)
        try FileManager.default.copyItem(at: old.url, to: own.appendingPathComponent("damaged"))
        try await store.removePartial("notes")
        #expect(!FileBytes.exists(own.appendingPathComponent("damaged").path))
        #expect(try await store.rollback("notes").version == new.version)
    }

    @Test func aFullDiskIsFoundBeforeAndDuring() async throws {
        _ = try serve(seed: 1)
        var disk = StoreDisk.system
        disk.free = { _ in 1000 }
        let text = await failure(try StoreFixtures.store(home, disk: disk))
        #expect(text.contains("1000 bytes are free"))
        #expect(server.takeRequests().count == 2)

        disk = .system
        disk.write = { descriptor, bytes in
            guard lseek(descriptor, 0, SEEK_CUR) < 30_000 else {
                errno = ENOSPC
                return -1
            }
            return StoreDisk.system.write(
                descriptor, UnsafeRawBufferPointer(rebasing: bytes.prefix(1000)))
        }
        let full = await failure(try StoreFixtures.store(home, disk: disk))
        #expect(full.contains("cannot be written"))
        let kept = try #require(StoreFixtures.partials(home).values.max())
        #expect((30_000..<31_000).contains(kept))
        _ = server.takeRequests()
        _ = try await StoreFixtures.store(home).install("notes", from: server.url("b"))
        let rest = server.takeRequests().filter { $0.path.hasSuffix(StoreFixtures.weights) }
        #expect(rest.map(\.start) == [kept])
    }

    @Test func whatWasCancelledGoesOn() async throws {
        _ = try serve(seed: 1)
        let path = "b/\(StoreFixtures.weights)"
        let gate = StoreServer.Gate()
        defer { gate.open() }
        let kept = 20_000
        server.fail(path, .held(kept, gate))
        let store = try StoreFixtures.store(home)
        let (stream, started) = AsyncStream<Void>.makeStream()
        let task = Task {
            try await store.install("notes", from: server.url("b")) { event in
                // The two files before it have 3002 bytes.
                if case .receiving(_, let done, _) = event, done >= 3002 + kept { started.yield() }
            }
        }
        for await _ in stream { break }
        task.cancel()
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(StoreFixtures.partials(home).values.map { $0 } == [kept])
        #expect(try await store.installed("notes") == nil)
        _ = server.takeRequests()
        _ = try await store.install("notes", from: server.url("b"))
        let requests = server.takeRequests().filter { $0.path == "/\(path)" }
        #expect(requests.map(\.start) == [kept] && requests.map(\.sent) == [100_000 - kept])
    }

    @Test func aStalledConnectionIsEnded() async throws {
        _ = try serve(seed: 1)
        server.fail("b/\(StoreFixtures.weights)", .stall(5000))
        var options = StoreFixtures.quick
        options.stall = .seconds(1)
        // A busy machine may make answers late that no fault holds back.
        options.attempts = 1000
        let events = StoreEvents()
        let store = try StoreFixtures.store(home, options)
        _ = try await store.install("notes", from: server.url("b")) { events.add($0) }
        #expect(events.waits.contains { $0.contains("nothing came") })
        let requests = server.takeRequests().filter { $0.path == "/b/\(StoreFixtures.weights)" }
        #expect(requests.count > 1 && requests[0].sent == 5000)
        #expect(requests.allSatisfy { ($0.start ?? 5000) >= 5000 })
    }

    @Test func installsOfOneNameWaitForEachOther() async throws {
        _ = try serve(seed: 1)
        let store = try StoreFixtures.store(home)
        let versions = try await withThrowingTaskGroup(of: String.self) { group in
            for _ in 0..<4 {
                group.addTask {
                    try await store.install("notes", from: server.url("b")).version
                }
            }
            return try await group.reduce(into: Set<String>()) { $0.insert($1) }
        }
        #expect(versions.count == 1)
        let paths = server.takeRequests().map(\.path)
        #expect(paths.filter { $0.hasSuffix(StoreFixtures.weights) }.count == 1)
        #expect(paths.filter { $0.hasSuffix("SHA256SUMS") }.count == 4)
    }

    @Test func twoStoresOfOneFolderDoNotMix() async throws {
        _ = try serve(seed: 1)
        let gate = StoreServer.Gate()
        server.fail("b/\(StoreFixtures.weights)", .held(1000, gate))
        let (stream, started) = AsyncStream<Void>.makeStream()
        let first = try StoreFixtures.store(home)
        async let here = first.install("notes", from: server.url("b")) { event in
            if case .receiving(let path, _, _) = event, path == StoreFixtures.weights {
                started.yield()
            }
        }
        for await _ in stream { break }
        let text = await failure(try StoreFixtures.store(home))
        gate.open()
        #expect(text.contains("another process is installing it"))
        _ = try await ModelBundle.open(here.url)
    }
}
