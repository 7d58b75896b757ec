package migrate

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/deployments"
)

// ImportOptions are the options of Import.
type ImportOptions struct {
	Objects *object.Client
	// Prefix is the URL below which stretcher's manifests lie.
	Prefix string
	// To is the URL below which the manifests are copied. Empty: kedge/ below Prefix.
	To string
	// Repo is the deployments repo's directory.
	Repo   string
	Naming Naming
	// Fix makes Import copy each manifest as the function Fix adapts it.
	Fix bool
	// Archives makes Import inspect the archives, too.
	Archives bool
}

// Imported is the result for one unit.
type Imported struct {
	Unit deployments.UnitID `json:"unit"`
	// From is the newest of stretcher's manifests for the unit. OlderCount is how many older ones there are.
	From       string `json:"from"`
	OlderCount int    `json:"older"`
	// Pointer names the copy. File is the unit file. Written is set if the file was made or changed.
	Pointer deployments.Pointer `json:"pointer"`
	File    string              `json:"file"`
	Written bool                `json:"written"`
	// Fixed says in words what differs in the copy.
	Fixed []string `json:"fixed,omitempty"`
	// Notes are surprises in the manifest or its archive: see Inspection.
	Notes []deployments.Problem `json:"notes,omitempty"`
	// Refused says why no node would take the manifest. Unless it is empty, nothing was copied or written.
	Refused deployments.Problems `json:"refused,omitempty"`
}

// Import copies the newest manifest of each unit to a key that contains its digest, and writes the unit file, which
// names the copy. In an existing file it changes only the release. It skips what is done already, so that it can run
// after each deployment until all nodes use kedge. It leaves out manifests that no node would take: see
// Imported.Refused. strange are the URLs of manifests that belong to no unit. If a unit can't be imported, done has the
// units imported before it.
func Import(ctx context.Context, o ImportOptions) (done []Imported, strange []string, err error) {
	if !strings.HasSuffix(o.Prefix, "/") {
		o.Prefix += "/"
	}
	if err := o.Naming.check(); err != nil {
		return nil, nil, err
	}
	to := strings.TrimSuffix(cmp.Or(o.To, o.Prefix+"kedge"), "/") + "/"
	listed, err := manifestsBelow(ctx, o.Objects, o.Prefix)
	if err != nil {
		return nil, nil, err
	}
	units := map[deployments.UnitID][]object.Listed{}
	for _, l := range listed {
		if strings.HasPrefix(l.URL, to) {
			continue
		}
		id, err := o.Naming.UnitOf(strings.TrimPrefix(l.URL, o.Prefix))
		if err != nil {
			strange = append(strange, l.URL)
			continue
		}
		units[id] = append(units[id], l)
	}
	ids := make([]deployments.UnitID, 0, len(units))
	for id := range units {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, deployments.UnitID.Compare)
	for _, id := range ids {
		all := units[id]
		newest := slices.MaxFunc(all,
			func(a, b object.Listed) int { return cmp.Or(a.Modified.Compare(b.Modified), cmp.Compare(a.URL, b.URL)) })
		one, err := importOne(ctx, o, to, id, newest.URL)
		if err != nil {
			return done, strange, fmt.Errorf("importing %s: %w", id, err)
		}
		one.OlderCount = len(all) - 1
		done = append(done, one)
	}
	return done, strange, nil
}

func importOne(ctx context.Context, o ImportOptions, to string, id deployments.UnitID, url string) (Imported, error) {
	one := Imported{Unit: id, From: url}
	raw, err := o.Objects.ReadAll(ctx, url, deployments.MaxManifest)
	if err != nil {
		return one, err
	}
	objects := o.Objects
	if !o.Archives {
		objects = nil
	}
	in, err := Inspect(ctx, objects, Source{Name: url, URL: url, Raw: raw})
	if err != nil {
		return one, err
	}
	if one.Notes, one.Refused = in.Notes, in.Refused; len(in.Refused) > 0 {
		return one, nil
	}
	if o.Fix {
		if raw, one.Fixed, err = Fix(ctx, o.Objects, in); err != nil {
			return one, err
		}
	}
	if one.Pointer, err = CopyByDigest(ctx, o.Objects, to, id, url, raw); err != nil {
		return one, err
	}
	file := filepath.Join(id.Stage, id.Role, id.Unit+".yaml")
	one.File = filepath.Join(o.Repo, file)
	one.Written, err = writeUnit(o.Repo, file, url, one.Pointer)
	return one, err
}

// CopyByDigest copies a manifest's bytes to a key that contains their digest, and so never changes, below a prefix. It
// returns the copy's pointer. from is where the bytes were found: a manifest with a src, index or delta relative to it
// can't be copied.
func CopyByDigest(
	ctx context.Context,
	objects *object.Client,
	to string,
	id deployments.UnitID,
	from string,
	raw []byte,
) (deployments.Pointer, error) {
	p := deployments.Pointer{Digest: sha256.Sum256(raw)}
	p.URL = strings.TrimSuffix(to, "/") + "/" + id.String() + "/" + p.Digest.String() + "/manifest.yaml"
	before, err := deployments.ParseTemplate(raw, from)
	if err != nil {
		return p, err
	}
	if after, err := deployments.ParseTemplate(raw, p.URL); err != nil || !reflect.DeepEqual(after, before) {
		return p, errors.Join(err, fmt.Errorf("%s can't be copied, as a URL of its src, index or deltas is relative to its "+
			"own place: write whole URLs", deployments.ShownURL(from)))
	}
	err = objects.Put(ctx, p.URL, bytes.NewReader(raw), int64(len(raw)),
		object.PutOptions{ContentType: "application/yaml"})
	if err != nil {
		return p, fmt.Errorf("copying the manifest: %w", err)
	}
	return p, nil
}

// releaseLine matches the release line of a unit file.
var releaseLine = regexp.MustCompile(`(?m)^release:[^\n#]*?([ \t]*#[^\n]*)?$`)

// writeUnit sets the release in a unit file of a repo, or makes the file, with adopt set. It reports whether it wrote
// the file. As the repo may be untrusted, writeUnit follows no link out of it, and only reads and replaces regular
// files.
func writeUnit(repo, file, from string, p deployments.Pointer) (bool, error) {
	if err := os.MkdirAll(repo, 0o755); err != nil {
		return false, err
	}
	root, err := os.OpenRoot(repo)
	if err != nil {
		return false, err
	}
	defer root.Close()
	was, err := readUnit(root, file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	text := fmt.Sprintf(`# stretcher's manifest: %s
release: %s
adopt: true # nodes that hold this release already take it over as it is
`, from, p)
	if err == nil {
		if len(releaseLine.FindAllIndex(was, -1)) != 1 {
			return false, fmt.Errorf("%s: want exactly one line that begins with \"release:\", as import replaces it", file)
		}
		release := strings.ReplaceAll("release: "+p.String(), "$", "$$")
		text = releaseLine.ReplaceAllString(string(was), release+"$1")
	}
	if text == string(was) {
		return false, nil
	}
	if err := root.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return false, err
	}
	aside := filepath.Join(filepath.Dir(file), ".kedge-"+filepath.Base(file))
	if err := root.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := writeSynced(root, aside, text); err != nil {
		return false, err
	}
	return true, root.Rename(aside, file)
}

// writeSynced writes a new file and syncs it. After it is renamed, even a power cut leaves its content complete.
func writeSynced(root *os.Root, name, text string) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// readUnit reads a unit file. A file that isn't regular or has more than deployments.MaxUnitFile bytes is an error.
func readUnit(root *os.Root, file string) ([]byte, error) {
	f, err := root.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0) // opening a pipe would block for ever
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file", file))
	}
	text, err := io.ReadAll(io.LimitReader(f, deployments.MaxUnitFile+1))
	if err == nil && len(text) > deployments.MaxUnitFile {
		err = fmt.Errorf("%s has more than %d bytes", file, deployments.MaxUnitFile)
	}
	return text, err
}

// manifestsBelow returns the .yml and .yaml objects below a prefix, by URL; more than maxPrefix objects are an error.
func manifestsBelow(ctx context.Context, objects *object.Client, prefix string) ([]object.Listed, error) {
	all, more, err := objects.List(ctx, prefix, maxPrefix)
	if err != nil {
		return nil, err
	}
	if more {
		return nil, fmt.Errorf("below %s are more than %d objects: name a prefix with fewer", prefix, maxPrefix)
	}
	manifests := slices.DeleteFunc(all, func(l object.Listed) bool {
		return !strings.HasSuffix(l.URL, ".yml") && !strings.HasSuffix(l.URL, ".yaml")
	})
	slices.SortFunc(manifests, func(a, b object.Listed) int { return strings.Compare(a.URL, b.URL) })
	return manifests, nil
}
