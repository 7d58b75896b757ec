package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	neturl "net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
)

// maxPrefix bounds the objects below a prefix, of any name.
const maxPrefix = 100_000

// Source is a manifest that was read.
type Source struct {
	// Name names the manifest for people: a URL, a file's path, or - for the standard input.
	Name string
	// URL is the manifest's URL. For a file, and for the standard input, it begins with file://.
	URL string
	Raw []byte
}

// Inspection says what a kedge node would do differently from stretcher.
type Inspection struct {
	Source Source
	// Manifest was parsed without values for its variables; nil: no node would take it, because of Refused.
	Manifest *deployments.Manifest
	Refused  deployments.Problems
	// Notes are surprises in the manifest or in its archive.
	Notes []deployments.Problem
	// Archive describes the archive; nil: it wasn't inspected.
	Archive *Archive
}

// Archive describes an archive's content.
type Archive struct {
	Files, Links int
	Bytes        int64
	// Outside are symbolic links that lead out of the tree, as LINK -> TARGET.
	Outside []string
}

// Inspect parses a manifest as a node would. If objects isn't nil and src has no variables, it also unpacks the
// archive into a temporary directory. What is wrong with the manifest or the archive is in the Inspection; the error
// only says why the inspection itself failed.
func Inspect(ctx context.Context, objects *object.Client, s Source) (Inspection, error) {
	in := Inspection{Source: s}
	m, err := deployments.ParseTemplate(s.Raw, s.URL)
	if err != nil {
		in.refuse(err)
		return in, nil
	}
	in.Manifest = m
	traps, err := deployments.ManifestTraps(s.Raw)
	if err != nil {
		in.refuse(err)
		return in, nil
	}
	for _, t := range traps {
		t.File = s.Name
		in.Notes = append(in.Notes, t)
	}
	if objects == nil || m.Src == "" {
		return in, nil
	}
	if variableSrc.Match(s.Raw) {
		in.note("src has a variable, so the archive was not looked at")
		return in, nil
	}
	return in, in.unpack(ctx, objects)
}

// variableSrc matches a src that depends on the node's environment.
var variableSrc = regexp.MustCompile(`(?m)^[ \t]*["']?src["']?[ \t]*:.*\{\{`)

func (in *Inspection) note(format string, args ...any) {
	in.Notes = append(in.Notes, deployments.Problem{File: in.Source.Name, Message: fmt.Sprintf(format, args...)})
}

// refuse records why no node would take the manifest.
func (in *Inspection) refuse(err error) {
	in.Manifest = nil
	found := deployments.Problems(nil)
	if !errors.As(err, &found) {
		found = deployments.Problems{{Message: err.Error()}}
	}
	for _, p := range found {
		p.File = in.Source.Name
		in.Refused = append(in.Refused, p)
	}
}

// unpack unpacks the archive as nodes do, but sets no owner and allows all kinds of links. Then it
// inspects the result.
func (in *Inspection) unpack(ctx context.Context, objects *object.Client) error {
	dir, err := os.MkdirTemp("", "kedge-inspect-")
	if err != nil {
		return fmt.Errorf("making a directory to unpack into: %w", err)
	}
	defer os.RemoveAll(dir)
	m := *in.Manifest
	m.Symlinks, m.Owner = deployments.SymlinksAny, ""
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return err
	}
	err = artifact.Unpack(ctx, objects, &m, tree, artifact.StageOptions{})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, object.ErrUnavailable) {
		return fmt.Errorf("%s: the archive: %w", in.Source.Name, err)
	}
	if err != nil {
		in.refuse(fmt.Errorf("the archive: %s", strings.ReplaceAll(err.Error(), tree, "DEST")))
		return nil
	}
	if in.Archive, err = describeTree(tree); err != nil {
		return fmt.Errorf("looking into the archive of %s: %w", in.Source.Name, err)
	}
	if n := len(in.Archive.Outside); n > 0 && in.Manifest.Symlinks != deployments.SymlinksAny {
		in.note("the archive has links that lead out of its tree (%d, the first is %q): kedge refuses the archive unless "+
			"the manifest says symlinks: any", n, in.Archive.Outside[0])
	}
	return nil
}

// describeTree counts the files and links of a tree, and lists the links that lead out of it.
func describeTree(tree string) (*Archive, error) {
	a := new(Archive)
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.Type().IsRegular():
			info, err := d.Info()
			if err != nil {
				return err
			}
			a.Files++
			a.Bytes += info.Size()
		case d.Type()&fs.ModeSymlink != 0:
			a.Links++
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(tree, path)
			if err != nil {
				return err
			}
			if filepath.IsAbs(target) || !filepath.IsLocal(filepath.Join(filepath.Dir(rel), target)) {
				a.Outside = append(a.Outside, rel+" -> "+target)
			}
		}
		return nil
	})
	return a, err
}

// Find reads the manifests that text names: a file's path, a URL, or - for the content of in. text may also be a
// directory, or a URL that ends in a slash. Then Find reads all .yml and .yaml files below it, and it is an error if
// there are none.
func Find(ctx context.Context, objects *object.Client, text string, in io.Reader) ([]Source, error) {
	if text == "-" {
		raw, err := io.ReadAll(io.LimitReader(in, deployments.MaxManifest+1))
		return []Source{{Name: text, URL: "file:///manifest.yaml", Raw: raw}}, err
	}
	url, isFile := text, !strings.Contains(text, "://")
	if isFile {
		info, err := os.Stat(text)
		if err != nil {
			return nil, err
		}
		path, err := filepath.Abs(text)
		if err != nil {
			return nil, err
		}
		if url = (&neturl.URL{Scheme: "file", Path: path}).String(); info.IsDir() {
			url += "/"
		}
	}
	if !strings.HasSuffix(url, "/") {
		raw, err := objects.ReadAll(ctx, url, deployments.MaxManifest)
		return []Source{{Name: text, URL: url, Raw: raw}}, err
	}
	listed, err := manifestsBelow(ctx, objects, url)
	if err != nil {
		return nil, err
	}
	var found []Source
	for _, o := range listed {
		raw, err := objects.ReadAll(ctx, o.URL, deployments.MaxManifest)
		if err != nil {
			return nil, err
		}
		name := o.URL
		if isFile {
			name = filepath.Join(text, strings.TrimPrefix(o.URL, url))
		}
		found = append(found, Source{Name: name, URL: o.URL, Raw: raw})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("there is no .yml or .yaml object below %s", text)
	}
	return found, nil
}
