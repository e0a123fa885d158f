import Foundation
import Testing

@testable import Phi3Core

@Suite("What a store refuses", StoreFixtures.limit)
struct StoreRefusalTests {
    private let server: StoreServer
    private let home: TestFolder

    init() throws {
        server = try StoreServer()
        home = try TestFolder()
        try server.serve(StoreFixtures.bundle(seed: 1), as: "b")
    }

    private func failure(
        _ address: URL? = nil, _ options: StoreOptions = StoreFixtures.quick,
        name: String = "notes",
        version: String? = nil
    ) async throws -> String {
        let store = try StoreFixtures.store(home, options)
        do {
            _ = try await store.install(name, from: address ?? server.url("b"), version: version)
            return "installed"
        } catch {
            #expect(try await store.list().isEmpty)
            return isReadable(error) ? "\(error)" : "unreadable: \(error)"
        }
    }

    @Test func theNetworkIsOffUnlessAllowed() async throws {
        let store = try StoreFixtures.store(home, StoreOptions())
        await #expect {
            try await store.install("notes", from: server.url("b"))
        } throws: {
            if case Phi3Error.networkDisabled = $0 { true } else { false }
        }
        #expect(server.takeRequests().isEmpty)
        // What is installed is there without a network.
        let here = try await StoreFixtures.store(home).install("notes", from: server.url("b"))
        #expect(try await store.installed("notes") == here)
        let again = try await store.install("notes", from: server.url("b"), version: here.version)
        #expect(again == here)
    }

    @Test(arguments: [
        "http://example.com/b", "ftp://127.0.0.1/b", "file:///tmp/b", "b", "https://",
        "https://user:sesame@example.com/b", "http://127.0.0.1.example.com/b",
    ])
    func addressesWithoutHTTPSAreRefused(address: String) async throws {
        let text = try await failure(URL(string: address)!)
        #expect(text.contains("address") && !text.contains("sesame"), "\(text)")
    }

    @Test(arguments: ["", ".", "..", "a/b", "../x", ".store", "a\u{0}b", "a\\b"])
    func namesThatAreNoFoldersAreRefused(name: String) async throws {
        #expect(try await failure(name: name).contains("the name of a bundle"))
        #expect(server.takeRequests().isEmpty)
    }

    @Test(arguments: ["../../x", "/etc/passwd", "a/../../x", "C:\\x", "x/"])
    func pathsInTheListOfHashesAreNotTrusted(path: String) async throws {
        let hash = String(repeating: "a", count: 64)
        let sums = try #require(
            String(data: Data(contentsOf: bundleSums()), encoding: .utf8))
        server.set(Data("\(sums)\(hash)  \(path)\n".utf8), at: "b/SHA256SUMS")
        #expect(try await failure().contains("outside the bundle"))
        #expect(server.takeRequests().map(\.path) == ["/b/SHA256SUMS"])
    }

    private func bundleSums() throws -> URL {
        let folder = try StoreFixtures.bundle(seed: 1)
        let copy = home["sums"]
        try? FileManager.default.removeItem(at: copy)
        try FileManager.default.copyItem(at: folder["SHA256SUMS"], to: copy)
        return copy
    }

    @Test func aManifestOfAnotherBundleIsRefused() async throws {
        let other = try StoreFixtures.bundle(seed: 2)
        server.set(try Data(contentsOf: other["metadata.json"]), at: "b/metadata.json")
        #expect(try await failure().contains("is not the one that SHA256SUMS lists"))
    }

    @Test func impostorsAreNamed() async throws {
        let pointer = Data(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100000\n".utf8)
        server.fail("b/\(StoreFixtures.weights)", .file(pointer))
        #expect(try await failure().contains("a Git LFS pointer"))
        server.fail("b/\(StoreFixtures.weights)", .file(Data("<!DOCTYPE html><html>".utf8)))
        #expect(try await failure().contains("an HTML page"))
        server.fail("b/SHA256SUMS", .file(Data("\n <HTML><body>Sign in</body>".utf8)))
        #expect(try await failure().contains("an HTML page"))
        let long = Data("<html>".utf8) + Data(repeating: 0x20, count: 300_000)
        server.fail("b/\(StoreFixtures.weights)", .file(long))
        #expect(try await failure().contains("an HTML page"))
        server.fail("b/\(StoreFixtures.weights)", .file(Data(repeating: 1, count: 50)))
        #expect(try await failure().contains("50 bytes instead of 100000"))
        server.fail("b/\(StoreFixtures.weights)", .file(Data(repeating: 1, count: 200_000)))
        #expect(try await failure().contains("more bytes than the 100000 it has"))
        #expect(try await failure() == "installed")
    }

    @Test func statusesDecideWhetherToAskAgain() async throws {
        for status in [400, 401, 403, 404, 410, 501] {
            server.fail("b/metadata.json", .status(status))
            #expect(try await failure().contains("answered \(status)"))
            #expect(server.takeRequests().count == 2)
        }
        for status in [408, 429, 500, 503] {
            for _ in 0..<3 { server.fail("b/metadata.json", .status(status)) }
            #expect(try await failure().contains("answered \(status), 3 times"))
            #expect(server.takeRequests().count == 4)
        }
        server.fail("b/metadata.json", .status(503, ["Retry-After": "1"]), .status(416))
        #expect(try await failure() == "installed")
    }

    @Test func redirectsStayOnThisMachineAndEnd() async throws {
        server.fail("b/SHA256SUMS", .status(302, ["Location": "http://example.com/x"]))
        #expect(try await failure().contains("a redirect to an address without https"))
        let own = server.url("b/SHA256SUMS").absoluteString
        for _ in 0..<10 { server.fail("b/SHA256SUMS", .status(302, ["Location": own])) }
        #expect(try await failure().contains("more than 5 redirects"))
        #expect(server.takeRequests().count == 7)
        server.fail("b/metadata.json", .status(200))
        #expect(
            FileAddress.follow(
                from: URL(string: "https://a.b")!, to: server.url("x"), count: 0) != nil)
    }

    @Test func anotherVersionThanTheAppKnowsIsRefused() async throws {
        let hash = String(repeating: "a", count: 64)
        #expect(try await failure(version: hash).contains("Nothing was installed"))
        #expect(server.takeRequests().map(\.path) == ["/b/SHA256SUMS"])
        #expect(try await failure(version: "abc").contains("SHA-256"))
    }

    @Test func aServerThatIsGoneIsNamed() async throws {
        server.stop()
        let text = try await failure()
        #expect(text.contains("3 times") && text.contains("127.0.0.1"), "\(text)")
    }

    @Test func queriesAreKeptAndNotShown() {
        let base = URL(string: "https://example.com/a%20b/notes.medphi/?key=secret#x")!
        let file = FileAddress.file("model/x y.bin", of: base)
        #expect(
            file?.absoluteString
                == "https://example.com/a%20b/notes.medphi/model/x%20y.bin?key=secret")
        #expect(FileAddress.shown(base) == "https://example.com/a%20b/notes.medphi/")
    }

    @Test func waitsGrowAndHaveAnEnd() {
        let options = StoreOptions(firstDelay: .seconds(1), longestDelay: .seconds(10))
        let waits = (1...6).map { options.delay(attempt: $0, asked: nil).seconds }
        #expect(waits == [1, 2, 4, 8, 10, 10])
        #expect(options.delay(attempt: 1, asked: 5) == .seconds(5))
        #expect(options.delay(attempt: 1, asked: .max) == .seconds(10))
        #expect(throws: Phi3Error.self) { try StoreOptions(attempts: 0).validate() }
        #expect(throws: Phi3Error.self) { try StoreOptions(stall: .zero).validate() }
    }
}
