// Package archive has the formats of a release: it makes and reads archives, their indexes, and deltas between them. It
// knows no storage; package artifact publishes and fetches what is made here.
//
// # The archive
//
// An archive is a tar stream in zstd, so that `tar --zstd -xf` opens it. What makes it more than that is where its
// zstd frames begin and end: each can be fetched, checked and decoded alone.
//
//   - Entries are in the order of a walk: a directory, then what is in it, names compared byte by byte. What ustar
//     can't hold, such as a long name, is a PAX record. Times are 1980-01-01, owners 0, modes the nine permission bits
//     and, on a directory, sticky and set-group-id. Extended attributes are not kept. Sockets, pipes, devices, setuid
//     and setgid files are refused when packing, and symbolic links out of the tree unless the manifest allows them.
//   - A file of 1 MiB or more is large: its header ends the frame before it, its content is cut into frames of 2 MiB
//     that hold nothing else, and its padding begins the frame after it. Everything else is gathered into frames. A
//     frame of 768 KiB or more ends before the next entry whose path's FNV-1a hash is divisible by four, and in any
//     case at about 2 MiB. So borders follow names, and stay where they were when one file grows.
//   - No frame decodes to more than 4 MiB. The same tree gives the same bytes with the same version of kedge and the
//     same compression, whatever the number of cores.
//
// A reader requires only that frames keep to these 4 MiB, and that the index describes them as
// below. How content is cut, and how hard it is compressed, is up to who packs. Earlier versions
// made frames of 192 to 512 KiB for small files; they read today's archives, and agents of today
// read theirs.
//
// Frames make an archive larger, as the encoder forgets at each what came before. They save bytes
// if a node has no delta and needs only a few files. 561 MB in 44,567 files make 159.1 MB in frames
// of these sizes, and 169.7 MB in the former ones with the former compression; one stream of zstd
// -3 has 159.4 MB.
//
// # The index
//
// The index says what is in the archive and where, and is what a manifest pins: from its SHA-256 every other byte
// is checked. It is not compressed, as half of it is hashes: so its bytes follow from the archive alone. All numbers
// are unsigned varints (encoding/binary) unless said otherwise.
//
//	"kedgeix\x01"
//	flags         1: of an archive; 0: a list of hashes, taken from a tree that came without an index
//	entries, frames   their numbers
//	each entry, in the archive's order:
//	  kind        0 file, 1 directory, 2 symbolic link, 3 hard link
//	  shared      length, in bytes, of the longest common beginning of its path and the path before it
//	  length, the rest of the path
//	  mode
//	  file:       size, SHA-256 (32 bytes), and, of an archive, gap: the bytes of the tar stream between the end of the
//	              content before it and its own content; 0 for an empty file
//	  symbolic:   length, target
//	  hard:       number of the entry, a file before it, that it is another name of
//	each frame, in the archive's order:
//	  size        of the frame in the archive
//	  2n or 2n+1  it decodes to n bytes
//	  SHA-256     of the frame as it lies in the archive
//	  SHA-256     only if the number before is 2n+1: of the decoded bytes, all of which are one file's content
//
// The top directory has no entry. Every other directory has an entry, before what is in it; no path
// leads through a link. Unless the manifest allows any target, a symbolic link's target is relative,
// and its ".." come first and do not climb above the top. A path has at most 4,096 bytes, in at most 128
// parts of at most 255 bytes. All paths together have at most 64 MiB plus 32 times the size of the
// index. A tree has at most 64 TiB, an index 4,194,304 entries and 512 MiB. A reader refuses
// everything else before it makes a file.
//
// # The delta
//
// A delta turns the index and tree of one release into those of another. It starts with
//
//	"kedgedl\x01"
//	SHA-256 of the index that it starts from, SHA-256 of the index that it makes (32 bytes each)
//
// and goes on as one zstd frame with a window of at most 8 MiB, of
//
//	size of the new index, and its patch against the old one
//	for each file: 1 + how many entries of the new index were passed over since the last; 1 + the number of the old
//	index's entry that is patched, or 0 for none; its patch
//	0
//
// Files whose content the old release has, under whatever name, are not in the delta. Others may be missing as well,
// and come from the archive. A patch is a row of sections, each of which makes the next 4 MiB (the last what is left):
//
//	lengths of four parts, then the parts:
//	  ops         seek (signed varint: from where the section's last op stopped in the old file, at first 0), add, extra
//	  runs        of the added bytes: same, differ, same, differ … until all are counted
//	  differ      what to add, modulo 256, to the old bytes that differ
//	  extra       bytes that the old file has not
//
// Each op copies add bytes of the old file, changed by the next runs, then extra bytes of the last part. What a
// patch makes is used only if its SHA-256 is the new index's; otherwise the file comes from the archive.
package archive
