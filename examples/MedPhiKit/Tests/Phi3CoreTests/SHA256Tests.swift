import Foundation
import Testing

@testable import Phi3Core

@Suite struct SHA256Tests {
    @Test(arguments: [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        ),
    ])
    func hashesEqualThoseOfTheStandard(text: String, hash: String) {
        #expect(SHA256.hex(Data(text.utf8)) == hash)
    }

    @Test func aMillionLettersGiveTheStandardsHash() {
        let data = Data(repeating: UInt8(ascii: "a"), count: 1_000_000)
        #expect(
            SHA256.hex(data) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    }

    @Test func theHashDoesNotDependOnThePieces() throws {
        var generator = SplitMix(5)
        let data = Data((0..<3000).map { _ in UInt8.random(in: 0...255, using: &generator) })
        for length in [0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 3000] {
            let part = data.prefix(length)
            var hash = SHA256()
            var at = 0
            while at < length {
                let end = min(at + Int.random(in: 1...100, using: &generator), length)
                hash.update(part[at..<end])
                at = end
            }
            #expect(hash.hexDigest() == SHA256.hex(Data(part)))
        }
    }

    @Test func aFileHashesAsItsBytes() throws {
        let folder = try TestFolder()
        let place = try folder.write(Data(repeating: 3, count: 100_000), "x")
        var seen = 0
        let hash = try SHA256.hex(contentsOf: place) { seen += $0 }
        #expect(hash == SHA256.hex(Data(repeating: 3, count: 100_000)))
        #expect(seen == 100_000)
        #expect(throws: Phi3Error.self) { try SHA256.hex(contentsOf: folder["none"]) }
        #expect(throws: Phi3Error.self) { try SHA256.hex(contentsOf: folder.url) }
    }
}
