package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// packaged is what a package says of a file: everything that its installation goes by.
type packaged struct {
	mode        uint32 // the permissions
	owner, link string
	sum         string // of a file's content
}

// debFiles returns the files and links of a deb.
func debFiles(t *testing.T, deb string) map[string]packaged {
	t.Helper()
	out, err := exec.Command("dpkg-deb", "--fsys-tarfile", deb).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]packaged{}
	for r := tar.NewReader(bytes.NewReader(out)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		p := packaged{mode: uint32(h.Mode & 0o7777), owner: h.Uname + ":" + h.Gname, link: h.Linkname}
		if h.Typeflag == tar.TypeReg {
			sum := sha256.New()
			if _, err := io.Copy(sum, r); err != nil {
				t.Fatal(err)
			}
			p.sum = fmt.Sprintf("%x", sum.Sum(nil))
		}
		files[filepath.Join("/", h.Name)] = p
	}
}

// rpmFiles returns the files and links of an rpm, by its header: a lead of 96 bytes, a header with signatures that is
// padded to 8 bytes, and the header proper (rpm's manual, "RPM V4 package format").
func rpmFiles(t *testing.T, file string) map[string]packaged {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, size := rpmHeader(t, data[96:])
	header, _ := rpmHeader(t, data[96+(size+7)/8*8:])
	const (
		modes, digests, links, users, groups = 1030, 1035, 1036, 1039, 1040
		dirOf, names, dirs                   = 1116, 1117, 1118
	)
	files := map[string]packaged{}
	sums, targets, owners, of := header.texts(digests), header.texts(links), header.texts(users), header.texts(groups)
	in := header.texts(dirs)
	for i, name := range header.texts(names) {
		mode := binary.BigEndian.Uint16(header.at(modes)[2*i:])
		if mode&0o170000 == 0o040000 {
			continue
		}
		dir := in[binary.BigEndian.Uint32(header.at(dirOf)[4*i:])]
		files[filepath.Join(dir, name)] = packaged{uint32(mode & 0o7777), owners[i] + ":" + of[i], targets[i], sums[i]}
	}
	return files
}

// rpmTags is a header of an rpm: where its values begin, by tag, and how many they are.
type rpmTags struct {
	data  []byte
	where map[uint32][2]uint32
}

func rpmHeader(t *testing.T, data []byte) (tags rpmTags, size int) {
	t.Helper()
	if !bytes.HasPrefix(data, []byte{0x8e, 0xad, 0xe8, 1}) {
		t.Fatalf("no header of an rpm: %x", data[:16])
	}
	n, length := int(binary.BigEndian.Uint32(data[8:])), int(binary.BigEndian.Uint32(data[12:]))
	tags = rpmTags{data[16+16*n : 16+16*n+length], map[uint32][2]uint32{}}
	for i := range n {
		entry := data[16+16*i:]
		number := func(at int) uint32 { return binary.BigEndian.Uint32(entry[at:]) }
		tags.where[number(0)] = [2]uint32{number(8), number(12)}
	}
	return tags, 16 + 16*n + length
}

func (h rpmTags) at(tag uint32) []byte { return h.data[h.where[tag][0]:] }

func (h rpmTags) texts(tag uint32) []string {
	return strings.Split(string(h.at(tag)), "\x00")[:h.where[tag][1]]
}
