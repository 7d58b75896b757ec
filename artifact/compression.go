package artifact

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

// maxDictionary bounds, in bytes, the memory that an xz stream can make its decoder allocate. xz -9 needs 64 MiB.
const maxDictionary = 64 << 20

// foreign lists the magic numbers of formats that kedge does not read. An archive in one of these formats is refused:
// deployed as a single file, it would replace a whole tree. A zip whose name ends as zipFiles says is deployed.
var foreign = []struct{ magic, name string }{
	{"PK\x03\x04", "zip"},
	{"PK\x05\x06", "zip"},
	{"7z\xbc\xaf\x27\x1c", "7z"},
	{"\x04\x22\x4d\x18", "lz4"},
	{"Rar!\x1a\x07", "rar"},
	{"\x1f\x9d", "compress (.Z)"},
	{"LZIP", "lzip"},
	{"\x89LZO\x00", "lzop"},
	{"xar!", "xar"},
	{"\x5d\x00\x00", "lzma"},
	{"070701", "cpio"},
	{"070702", "cpio"},
	{"070707", "cpio"},
}

// zipFiles are the endings of zip archives that are deployed as files, without unpacking them.
var zipFiles = []string{".jar", ".war", ".ear", ".whl", ".pex", ".pyz", ".apk"}

// decompress detects the compression by the first bytes of raw. It returns a reader of the decoded bytes, which fails
// with errBomb beyond limit, and name without the compression's suffix. Uncompressed input is returned as it is,
// without that bound. An archive of a foreign format is an error that names it. close frees the decoder; with an
// error it is nil.
func decompress(
	raw *bufio.Reader,
	name string,
	limit int64,
) (content *bufio.Reader, inner string, close func(), err error) {
	decoded := func(r io.Reader, endings ...string) (*bufio.Reader, string, func(), error) {
		for _, ending := range endings {
			if stem, ok := strings.CutSuffix(name, ending); ok {
				name = stem
				break
			}
		}
		return bufio.NewReaderSize(&bounded{r, limit}, 256<<10), name, func() {}, nil
	}
	head, _ := raw.Peek(6)
	starts := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case starts("\x1f\x8b"):
		z, err := gzip.NewReader(raw)
		if err != nil {
			return nil, "", nil, fmt.Errorf("gzip: %w", err)
		}
		return decoded(z, ".gz")
	case starts("\x28\xb5\x2f\xfd"), len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18":
		z, err := zstd.NewReader(raw, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(2*maxWindow))
		if err != nil {
			return nil, "", nil, fmt.Errorf("zstd: %w", err)
		}
		content, inner, _, _ = decoded(z, ".zst")
		return content, inner, z.Close, nil
	case len(head) >= 4 && starts("BZh") && head[3] >= '1' && head[3] <= '9':
		return decoded(bzip2.NewReader(raw), ".bz2")
	case starts("\xfd7zXZ\x00"):
		z, err := xz.NewReader(raw, maxDictionary)
		if err != nil {
			return nil, "", nil, fmt.Errorf("xz: %w", err)
		}
		return decoded(z, ".xz")
	}
	for _, f := range foreign {
		if starts(f.magic) && !(f.name == "zip" && slices.Contains(zipFiles, path.Ext(name))) {
			return nil, "", nil, fmt.Errorf(
				"it is a %s archive: want .tar, .tar.gz, .tar.zst, .tar.bz2, .tar.xz or a single file",
				f.name,
			)
		}
	}
	return raw, name, func() {}, nil
}
