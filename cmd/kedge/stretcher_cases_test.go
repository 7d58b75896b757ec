package main

import (
	"archive/tar"
	"slices"
	"strings"
)

// plain is the archive of most cases.
var plain = archive{entries: []string{
	"d 755 bin", "f 750 bin/run #!/bin/sh", "f 640 conf x=1", "l current bin", "f 644 exclude.list *.log\n",
}}

// hooks are commands for each occasion, which say that they ran.
const hooks = `commands:
  pre:
    - echo pre >> HOOKS
  post:
    - echo post >> HOOKS
  success:
    - echo success >> HOOKS; cat > /dev/null
  failure:
    - echo failure >> HOOKS; cat > /dev/null
`

// oldTree is what lies at dest before.
const oldTree = `mkdir -m 700 srv/app; echo 1 > srv/app/app.pid; echo log > srv/app/app.log; echo r > srv/app/rubbish; mkdir srv/app/old; echo o > srv/app/old/x`

func with(entries ...string) archive { return archive{entries: entries} }

func (a archive) through(name string, filter ...string) archive {
	a.name, a.filter = name, filter
	return a
}

// oldCases are the manifests and archives of TestStretchersTable.
func oldCases() []oldCase {
	return slices.Concat(fieldCases(), syntaxCases(), commandCases(), sourceCases(), archiveCases(), capistranoCases(), eventCases())
}

// fieldCases are the manifest's fields, one by one.
func fieldCases() []oldCase {
	cases := []oldCase{
		{name: "all defaults", manifest: "dest: DEST\n"},
		{name: "over an old tree", manifest: hooks, before: oldTree},
		{name: "excludes", manifest: "excludes:\n  - '*.pid'\n  - rubbish\n", before: oldTree},
		{name: "excludes of the archive's own files", manifest: "excludes:\n  - conf\n"},
		{name: "excludes, anchored", manifest: "excludes:\n  - /old\n  - /app.log\n", before: oldTree},
		{name: "exclude_from", manifest: "exclude_from: exclude.list\n", before: oldTree},
		{name: "exclude_from and excludes", manifest: "exclude_from: exclude.list\nexcludes: [rubbish]\n", before: oldTree},
		{name: "exclude_from that isn't there", manifest: "exclude_from: no.list\n" + hooks, before: oldTree},
		{name: "rsync by name", manifest: "sync_strategy: rsync\n"},
		{name: "no strategy", manifest: "sync_strategy: \"\"\n"},
		{name: "an unknown strategy", differs: "refused-runs-nothing", manifest: "sync_strategy: scp\n" + hooks},
		{name: "dest with a slash", manifest: "dest: DEST/\n"},
		{name: "dest_mode 0711", manifest: "dest_mode: 0711\n"},
		{name: "dest_mode 0711 in words", differs: "mode-as-text", manifest: "dest_mode: \"0711\"\n"},
		{name: "dest_mode 0o711", manifest: "dest_mode: 0o711\n"},
		{name: "dest_mode 755", differs: "octal-mode", manifest: "dest_mode: 755\n"},
		{name: "dest_mode 493", differs: "octal-mode", manifest: "dest_mode: 493\n"},
		{name: "dest_mode 02775", manifest: "dest_mode: 02775\n"},
		{name: "dest_mode over an old tree", manifest: "dest_mode: 0711\n", before: oldTree},
		{name: "md5", manifest: "src: SRC\nchecksum: SUMMD5\ndest: DEST\n"},
		{name: "sha1", manifest: "src: SRC\nchecksum: SUMSHA1\ndest: DEST\n"},
		{name: "sha512", manifest: "src: SRC\nchecksum: SUM512\ndest: DEST\n"},
		{name: "a checksum in upper case", manifest: "src: SRC\nchecksum: SUMUPPER\ndest: DEST\n"},
		{name: "no checksum", differs: "refused-runs-nothing", manifest: "src: SRC\ndest: DEST\n" + hooks},
		{name: "a wrong checksum", manifest: "src: SRC\nchecksum: 00000000000000000000000000000000\ndest: DEST\n" + hooks, before: oldTree},
		{name: "a short checksum", differs: "refused-runs-nothing", manifest: "src: SRC\nchecksum: 0000\ndest: DEST\n" + hooks, before: oldTree},
		{name: "mv", manifest: "sync_strategy: mv\n" + hooks},
		{name: "mv over an old tree", manifest: "sync_strategy: mv\n" + hooks, before: oldTree},
		{name: "mv over an empty directory", manifest: "sync_strategy: mv\n" + hooks, before: "mkdir srv/app"},
		{name: "mv with the old tree moved away", manifest: "sync_strategy: mv\ncommands:\n  pre: [mv DEST DEST.old]\n", before: oldTree},
		{name: "mv with dest_mode", manifest: "sync_strategy: mv\ndest_mode: 0711\n"},
		{name: "mv without a parent", manifest: "sync_strategy: mv\ndest: DIR/srv/none/app\n" + hooks},
		{name: "no dest", manifest: "src: SRC\nchecksum: SUM\n" + hooks},
		{name: "a dest with spaces", manifest: "dest: DIR/srv/my app\n"},
		{name: "a dest without a parent", manifest: "dest: DIR/srv/none/app\n" + hooks},
		{name: "a dest two levels without a parent", manifest: "dest: DIR/srv/none/none/app\n" + hooks},
		{name: "a dest whose parent pre makes", manifest: "dest: DIR/srv/a/b/app\ncommands:\n  pre: [mkdir -p DIR/srv/a/b]\n"},
		{name: "a dest that is a link to a directory", manifest: hooks, before: "mkdir srv/real; ln -s real srv/app; echo x > srv/real/x"},
		{name: "a dest that is a file", manifest: hooks, before: "echo x > srv/app"},
		{name: "a relative dest", differs: "refused-runs-nothing", manifest: "dest: srv/app\n" + hooks},
		{name: "a dest with dots", differs: "clean-dest", manifest: "dest: DIR/srv/x/../app\n"},
		{name: "an unknown field", differs: "strict-manifest", manifest: "destination: elsewhere\n" + hooks},
		{name: "no src", manifest: "src:\n" + hooks},
		{name: "src of no text", manifest: "src: \"\"\n" + hooks},
		{name: "no excludes", manifest: "excludes:\n" + hooks},
		{name: "no commands", manifest: "commands:\n"},
		{name: "the same twice", agent: "once-live", manifest: hooks, then: &plain},
		{name: "a newer release", differs: "by-content", manifest: hooks, then: &archive{entries: []string{"d 755 bin", "f 755 bin/run2 x", "f 600 conf x=2", "l current bin/run2"}}},
		{name: "a newer release by mv", manifest: "sync_strategy: mv\ncommands:\n  pre: ['rm -rf DEST.old; if [ -e DEST ]; then mv DEST DEST.old; fi']\n",
			then: &archive{entries: []string{"f 600 conf x=2"}}},
		{name: "of the same size and time", differs: "by-content", then: &archive{entries: []string{"d 755 bin", "f 750 bin/run #!/bin/xx", "f 640 conf x=9"}}, manifest: "dest: DEST\n"},
		{name: "a file where a directory was", then: &archive{entries: []string{"f 644 bin file"}}, manifest: "dest: DEST\n"},
		{name: "a directory where a file was", then: &archive{entries: []string{"d 755 conf", "f 644 conf/x x"}}, manifest: "dest: DEST\n"},
	}
	return withArchive(cases, plain)
}

// withArchive fills in the archive where a case has none.
func withArchive(cases []oldCase, a archive) []oldCase {
	for i := range cases {
		if c := &cases[i]; c.archive.entries == nil && c.archive.raw == "" {
			c.archive = a
		}
	}
	return cases
}

// syntaxCases are ways to write a manifest down.
func syntaxCases() []oldCase {
	return withArchive([]oldCase{
		{name: "env not set", manifest: "dest: '{{ env \"NO_SUCH_NAME\" \"DEST\" }}'\n"},
		{name: "env set", manifest: "dest: '{{ env \"TO\" \"/none\" }}'\n", env: []string{"TO=DIR/srv/app"}},
		{name: "env of two names", manifest: "commands:\n  post: ['echo {{ env \"NO_NAME\" \"NAME\" \"other\" }} >> HOOKS']\n", env: []string{"NAME=value"}},
		{name: "env in a command", manifest: "commands:\n  post:\n    - echo {{ env \"NAME\" \"x\" }} >> HOOKS\n", env: []string{"NAME=value"}},
		{name: "env that is empty", manifest: "commands:\n  post:\n    - echo {{ env \"NAME\" \"x\" }} >> HOOKS\n", env: []string{"NAME="}},
		{name: "must_env", manifest: "commands:\n  post:\n    - echo {{ must_env \"NAME\" }} >> HOOKS\n", env: []string{"NAME=value"}},
		{name: "must_env that is not set", manifest: "commands:\n  post:\n    - echo {{ must_env \"NO_SUCH_NAME\" }} >> HOOKS\n"},
		{name: "must_env piped", manifest: "commands:\n  post:\n    - 'echo {{ must_env \"NAME\" | json_escape }} >> HOOKS'\n", env: []string{"NAME=va\"lue"}},
		{name: "printf", manifest: "commands:\n  post:\n    - echo {{ printf \"%s-%d\" \"a\" 3 }} >> HOOKS\n"},
		{name: "if", manifest: "commands:\n  post:\n    - echo {{ if env \"NAME\" \"\" }}yes{{ else }}no{{ end }} >> HOOKS\n", env: []string{"NAME=value"}},
		{name: "a template that doesn't parse", manifest: "commands:\n  post:\n    - echo {{ env >> HOOKS\n"},
		{name: "anchors", manifest: "commands:\n  pre: &both\n    - echo both >> HOOKS\n  post: *both\n"},
		{name: "anchors merged", manifest: "x-base: &base\n  pre: [echo pre >> HOOKS]\ncommands:\n  <<: *base\n  post: [echo post >> HOOKS]\n"},
		{name: "a lone dash", manifest: "commands:\n  pre:\n    -\n  post:\n    - echo post >> HOOKS\n"},
		{name: "lone dashes", manifest: "commands:\n  pre:\n    -\n  post:\n    -\n    - echo post >> HOOKS\n    -\n  success:\n    -\n  failure:\n    -\n"},
		{name: "lists without items", manifest: "commands:\n  pre:\n  post: []\n  success: ~\n  failure:\n    - 'false'\n"},
		{name: "a block", manifest: "commands:\n  post:\n    - |\n      echo one >> HOOKS\n      echo two >> HOOKS\n"},
		{name: "a folded block", manifest: "commands:\n  post:\n    - >\n      echo one\n      two >> HOOKS\n"},
		{name: "commands that look like other things", manifest: "commands:\n  pre:\n    - true\n  post:\n    - echo 1 >> HOOKS\n"},
		{name: "a number as a command", manifest: "commands:\n  post:\n    - 42\n  failure: [echo failure >> HOOKS]\n"},
		{name: "a command of one text", differs: "one-command", manifest: "commands:\n  post: echo post >> HOOKS\n"},
		{name: "carriage returns", manifest: strings.ReplaceAll("dest: DEST\n"+hooks, "\n", "\r\n")},
		{name: "a byte-order mark", manifest: "\ufeffsrc: SRC\nchecksum: SUM\ndest: DEST\n" + hooks},
		{name: "a document's start", manifest: "---\nsrc: SRC\nchecksum: SUM\ndest: DEST\n" + hooks},
		{name: "two documents", differs: "strict-manifest", manifest: "src: SRC\nchecksum: SUM\ndest: DEST\n---\ndest: /none\n"},
		{name: "comments", manifest: "# web\ndest: DEST # here\n" + hooks},
		{name: "a field twice", differs: "strict-manifest", manifest: "dest: /none\ndest: DEST\n"},
		{name: "JSON", manifest: `{"src": "SRC", "checksum": "SUM", "dest": "DEST", "commands": {"post": ["echo post >> HOOKS"]}}`},
		{name: "tabs", manifest: "commands:\n\tpost:\n\t\t- echo post >> HOOKS\n"},
		{name: "nothing", differs: "strict-manifest", manifest: ""},
		{name: "a page of HTML", manifest: "<html><body>\n<h1>Not found</h1>\n"},
		{name: "colons in a command", manifest: "commands:\n  post:\n    - echo a:b c >> HOOKS\n"},
		{name: "a colon that YAML reads", manifest: "commands:\n  post:\n    - echo a: b >> HOOKS\n"},
		{name: "quotes in a command", manifest: "commands:\n  post:\n    - 'echo \"it''s\" >> HOOKS'\n"},
		{name: "an exclude that YAML reads", manifest: "excludes:\n  - *.pid\n"},
	}, plain)
}

// commandCases are what commands find, and what comes of their failures.
func commandCases() []oldCase {
	return withArchive([]oldCase{
		{name: "commands only", manifest: "SRCLESS\n" + hooks},
		{name: "commands only, with a dest", manifest: "SRCLESS\ndest: DEST\n" + hooks},
		{name: "commands only that fail", manifest: "SRCLESS\ncommands:\n  pre: ['false', echo never >> HOOKS]\n  post: [echo never >> HOOKS]\n  failure: [echo failure >> HOOKS]\n"},
		{name: "pre fails", manifest: "commands:\n  pre: [echo pre >> HOOKS; exit 3]\n  post: [echo never >> HOOKS]\n  failure: [echo failure >> HOOKS]\n", before: oldTree},
		{name: "post fails", agent: "first-release", manifest: "commands:\n  post: [echo post >> HOOKS; exit 3]\n" +
			"  success: [echo never >> HOOKS]\n  failure: [echo failure >> HOOKS]\n", before: oldTree},
		{name: "success fails", manifest: "commands:\n  success: [echo one >> HOOKS; exit 1, echo never >> HOOKS]\n  failure: [echo never >> HOOKS]\n"},
		{name: "failure fails", manifest: "commands:\n  post: ['false']\n  failure: [echo one >> HOOKS; exit 1, echo never >> HOOKS]\n"},
		{name: "several of each", manifest: "commands:\n  pre: [echo a >> HOOKS, echo b >> HOOKS]\n  post: [echo c >> HOOKS, echo d >> HOOKS]\n  success: [echo e >> HOOKS, echo f >> HOOKS]\n"},
		{name: "their environment", manifest: "commands:\n  post: ['echo $NAME $HOME $RUN >> HOOKS; env | grep -c ^AWS_REGION= >> HOOKS']\n", env: []string{"NAME=value"}},
		{name: "their directory", manifest: "commands:\n  pre: [pwd >> HOOKS]\n  post: [pwd >> HOOKS]\n  success: [pwd >> HOOKS]\n"},
		{name: "a relative path", manifest: "commands:\n  post: [echo x > srv/made]\n"},
		{name: "the directory of failure commands", manifest: "commands:\n  post: ['false']\n  failure: [pwd >> HOOKS]\n"},
		{name: "the directory of failure commands after rsync", differs: "failure-directory", manifest: "dest: DIR/srv/none/none/app\ncommands:\n  failure: [echo ran >> HOOKS, pwd >> HOOKS]\n"},
		{name: "their umask", manifest: "commands:\n  post: [umask >> HOOKS]\n"},
		{name: "standard input of pre", manifest: "commands:\n  pre: [wc -c >> HOOKS]\n"},
		{name: "the log on success", manifest: "commands:\n  pre: [echo pre says hello]\n  success: ['grep -c \"pre says hello$\" >> HOOKS']\n"},
		{name: "the log on failure", manifest: "commands:\n  post: [echo post says no; exit 1]\n  failure: ['grep -q \"post says no\" && echo told >> HOOKS']\n"},
		{name: "the log's end", manifest: "commands:\n  pre: [seq 1 3000; echo the end]\n  success: ['grep -c \"the end$\" >> HOOKS']\n"},
		{name: "two that read the log", manifest: "commands:\n  pre: [echo hello]\n  success: ['grep -c hello$ >> HOOKS', 'grep -c hello$ >> HOOKS']\n"},
		{name: "a success command that doesn't read the log", manifest: "commands:\n  success: [echo done >> HOOKS, echo again >> HOOKS]\n"},
		{name: "a pipe", manifest: "commands:\n  post: ['echo b a | tr \" \" \"\\n\" | sort >> HOOKS']\n"},
		{name: "set -e", manifest: "commands:\n  post: ['set -e; false; echo never >> HOOKS']\n  failure: [echo failure >> HOOKS]\n"},
		{name: "a program that isn't there", manifest: "commands:\n  post: [no-such-program-anywhere]\n  failure: [echo failure >> HOOKS]\n"},
		{name: "in the background", manifest: "commands:\n  post: ['(sleep 0.2; echo late >> HOOKS) & echo post >> HOOKS']\n  success: [sleep 0.4; echo success >> HOOKS]\n"},
		{name: "post changes the tree", manifest: "commands:\n  post: [mkdir DEST/tmp, ln -s ../shared DEST/log, rm DEST/conf]\n"},
		{name: "pre makes the tree", manifest: "commands:\n  pre: [mkdir DEST, echo x > DEST/x]\nexcludes: [x]\n"},
		{name: "a wrong archive stops no service", differs: "single-file", manifest: "src: SRC\nchecksum: SUM\ndest: DEST\n" + hooks, archive: archive{raw: "this is no archive"}},
	}, plain)
}

// sourceCases are places that archives come from.
func sourceCases() []oldCase {
	return withArchive([]oldCase{
		{name: "from a file", src: "file", manifest: hooks},
		{name: "from a file with spaces", src: "file:///DIR/my%20app.tar", archive: plain.through("my app.tar"), manifest: hooks},
		{name: "from a file with spaces as they are", src: "file://DIR/my app.tar", archive: plain.through("my app.tar"), manifest: hooks},
		{name: "from a file of localhost", src: "file://localhostDIR/app.tar", manifest: hooks},
		{name: "from a file that isn't there", src: "file:///none/app.tar", manifest: hooks},
		{name: "by http", src: "http", manifest: hooks},
		{name: "by http that redirects", src: "REDIRECT/app.tar", manifest: hooks},
		{name: "by http that isn't there", src: "HTTP/none.tar", manifest: hooks},
		{name: "by http with a query", src: "HTTP/app.tar?x=1", manifest: hooks},
		{name: "from S3 with spaces", src: "s3://kedge/KEY/my app.tar", archive: plain.through("my app.tar"), manifest: hooks},
		{name: "from S3 with a plus", src: "s3://kedge/KEY/a+b.tar", archive: plain.through("a+b.tar"), manifest: hooks},
		{name: "from S3 with a percent sign", src: "s3://kedge/KEY/a%20b.tar", archive: plain.through("a b.tar"), manifest: hooks},
		{name: "from S3 that isn't there", src: "s3://kedge/none.tar", manifest: hooks},
		{name: "from no bucket of ours", src: "s3://no-such-bucket/none.tar", manifest: hooks},
		{name: "by an unknown scheme", differs: "refused-runs-nothing", src: "ftp://localhost/app.tar", manifest: hooks},
		{name: "a path without a scheme", differs: "refused-runs-nothing", src: "DIR/app.tar", manifest: hooks},
	}, plain)
}

// archiveCases are what archives hold.
func archiveCases() []oldCase {
	long := strings.Repeat("directory-with-a-long-name/", 6) + "file"
	cases := []oldCase{
		{name: "gzip", archive: plain.through("app.tar.gz", "gzip")},
		{name: "gzip called tgz", archive: plain.through("app.tgz", "gzip")},
		{name: "bzip2", archive: plain.through("app.tar.bz2", "bzip2")},
		{name: "xz", archive: plain.through("app.tar.xz", "xz")},
		{name: "zstd", archive: plain.through("app.tar.zst", "zstd", "-q")},
		{name: "a tar called gz", archive: plain.through("app.tar.gz")},
		{name: "gzip called tar", archive: plain.through("app.tar", "gzip")},
		{name: "no ending", archive: plain.through("app")},
		{name: "two gzip streams", archive: archive{raw: "x", filter: []string{"sh", "-c", "mkdir -p x; cd x; echo a > a; tar cf - a | split -b 3000; for f in x??; do gzip -c $f; done; rm -rf ../x"}}},
		{name: "gzip cut off", differs: "unpacked-first", archive: archive{entries: plain.entries, name: "app.tar.gz", filter: []string{"gzip"}, cut: 150}, manifest: hooks},
		{name: "a tar cut off", differs: "unpacked-first", archive: archive{entries: []string{"f 644 a " + strings.Repeat("x", 3000)}, cut: 1500}, manifest: hooks},
		{name: "a tar without an end", archive: archive{entries: []string{"f 644 a x"}, cut: 1024}, manifest: hooks},
		{name: "more behind the tar", differs: "trailing-bytes", archive: archive{entries: plain.entries, more: "more"}},
		{name: "more behind gzip", differs: "unpacked-first", archive: archive{entries: plain.entries, filter: []string{"gzip"}, more: "more"}, manifest: hooks},
		{name: "dots before names", archive: with("d 755 ./", "d 755 ./bin/", "f 755 ./bin/run x")},
		{name: "a mode of its own", archive: with("d 700 ./", "f 644 ./x x")},
		{name: "a mode of its own and dest_mode", archive: with("d 700 ./", "f 644 ./x x"), manifest: "dest_mode: 0711\n"},
		{name: "an owner of its own", archive: with("d 755:1:2 ./", "f 644:3:4 ./x x")},
		{name: "owners by number", archive: with("d 755:1000:1000 a", "f 644:1001:1002 a/b x")},
		{name: "owners by name", archive: with("f 644:daemon:games x x")},
		{name: "owners of unknown names", archive: with("f 644:nobody-here:none-here x x")},
		{name: "owners of unknown names by mv", archive: with("f 644:nobody-here:none-here x x"), manifest: "sync_strategy: mv\n"},
		{name: "owners by name by mv", archive: with("d 755:daemon:games ./", "f 644:daemon:games x x"), manifest: "sync_strategy: mv\n"},
		{name: "setuid", differs: "setuid", archive: with("f 4755 x x", "f 644 y y")},
		{name: "setgid", differs: "setuid", archive: with("f 2755 x x")},
		{name: "a setgid directory", archive: with("d 2775:0:1 x", "f 644 x/y y")},
		{name: "a sticky directory", archive: with("d 1777 tmp")},
		{name: "hard links", archive: with("f 644 a x", "h b a")},
		{name: "hard links in directories", archive: with("d 755 d", "f 644 d/a x", "h e d/a")},
		{name: "a hard link to nothing", differs: "unpacked-first", archive: with("f 644 a x", "h b none"), manifest: hooks},
		{name: "an absolute link", differs: "links-out", archive: with("l python /usr/bin/python3")},
		{name: "a link out of the tree", differs: "links-out", archive: with("l up ../../etc/passwd")},
		{name: "a dangling link", archive: with("l a none")},
		{name: "a file through a link", differs: "through-links", archive: with("d 755 d", "l e d", "f 644 e/x x"), manifest: hooks},
		{name: "a file through a link out of the tree", differs: "unpacked-first", archive: with("l e /tmp", "f 644 e/kedge-escaped x"), manifest: hooks},
		{name: "a FIFO", differs: "special-files", archive: with("p pipe", "f 644 x x"), manifest: hooks},
		{name: "a device", differs: "special-files", archive: with("c null", "f 644 x x"), manifest: hooks},
		{name: "absolute names", differs: "absolute-names", archive: with("f 644 /abs/x x"), manifest: hooks},
		{name: "names that lead out", differs: "unpacked-first", archive: with("f 644 a x", "f 644 ../escaped x"), manifest: hooks},
		{name: "long names", archive: with("f 644 " + long + " x")},
		{name: "long names of GNU's", archive: archive{entries: []string{"f 644 " + long + " x"}, format: tar.FormatGNU}},
		{name: "the old format", archive: archive{entries: plain.entries, format: tar.FormatUSTAR}},
		{name: "a global header", archive: with("g", "f 644 a x")},
		{name: "an empty file", archive: with("f 644 empty ")},
		{name: "empty directories", archive: with("d 755 tmp", "d 700 tmp/cache", "d 755 log")},
		{name: "an archive without files", differs: "empty-archive", archive: archive{entries: []string{}, raw: strings.Repeat("\x00", 1024)}, manifest: hooks, before: oldTree},
		{name: "a file twice", archive: with("f 644 a one", "f 600 a two")},
		{name: "a directory after its files", archive: with("f 644 d/x x", "d 700 d")},
		{name: "a file, then a directory", differs: "file-and-directory", archive: with("f 644 a x", "d 755 a"), manifest: hooks},
		{name: "a link, then a file", archive: with("f 644 b b", "l a b", "f 644 a x")},
		{name: "directories that are not listed", archive: with("f 644 a/b/c/x x")},
		{name: "a directory that can't be written", archive: with("d 555 d", "f 444 d/x x")},
		{name: "files that can't be read", archive: with("f 0 x x", "d 0 d")},
		{name: "modes of every kind", archive: with("f 600 a x", "f 755 b x", "f 777 c x", "f 4 d x")},
		{name: "names with spaces", archive: archive{raw: "x", filter: []string{"sh", "-c", "d=$(mktemp -d); cd $d; mkdir 'a b'; echo x > 'a b/c d'; tar cf - --owner=0 --group=0 --mode=u=rwX,go=rX *; rm -rf $d"}}},
		{name: "a name of two lines", differs: "control-characters", archive: with("f 644 x x", "l a\nb x"), manifest: hooks},
		{name: "names of other scripts", archive: with("f 644 日本語/ファイル x", "f 644 ümläut x")},
		{name: "dot files", archive: with("f 600 .env S=1", "d 755 .git", "f 644 .git/HEAD x", "f 644 .gitignore x")},
		{name: "a sparse file", archive: archive{raw: "x", filter: []string{"sh", "-c", "d=$(mktemp -d); cd $d; truncate -s 1M s; printf end >> s; chmod 644 s; tar cSf - --owner=0 --group=0 s; rm -rf $d"}}},
		{name: "zip", differs: "unpacked-first", archive: archive{raw: "PK\x03\x04" + strings.Repeat("\x00", 100), name: "app.zip"}, manifest: hooks, before: oldTree},
		{name: "7z", differs: "unpacked-first", archive: archive{raw: "7z\xbc\xaf\x27\x1c" + strings.Repeat("\x00", 100), name: "app.7z"}, manifest: hooks, before: oldTree},
		{name: "a text in place of an archive", differs: "unpacked-first", archive: archive{raw: "a text\n", name: "app.txt"}, manifest: hooks, before: oldTree},
		{name: "a program in place of an archive", differs: "single-file", archive: archive{raw: "\x7fELF" + strings.Repeat("\x00", 100), name: "app"}, manifest: hooks},
		{name: "a virtualenv", differs: "links-out", archive: with("d 755 bin", "l bin/python /usr/bin/python3", "l bin/python3 python", "f 755 bin/pip #!x", "d 755 lib", "l lib64 lib", "f 644 pyvenv.cfg x")},
		{name: "npm's links", archive: with("d 755 node_modules", "d 755 node_modules/.bin", "l node_modules/.bin/tsc ../typescript/bin/tsc", "f 755 node_modules/typescript/bin/tsc x",
			"l node_modules/ours ../packages/ours", "f 644 packages/ours/index.js x")},
		{name: "owners over an old tree of another's", archive: with("d 755 ./", "f 644 ./x x"), before: "mkdir srv/app; chown -R 1:2 srv/app"},
	}
	for i := range cases {
		if cases[i].manifest == "" {
			cases[i].manifest = "dest: DEST\n"
		}
	}
	return cases
}

// capistranoCases are manifests as capistrano-stretcher renders them of public hook files.
func capistranoCases() []oldCase {
	rendered := func(hooks map[string]string, more string) string {
		list := func(name string) string {
			if h := hooks[name]; h != "" {
				return "    \n    - " + strings.ReplaceAll(h, "\n", "\n    \n    - ") + "\n    \n"
			}
			return "    \n    - \n    \n"
		}
		return "src: SRC\nchecksum: SUM\ndest: DIR/srv/releases/20150401123456\ncommands:\n  pre:\n" + list("pre") +
			"  post:\n    - ln -nfs DIR/srv/releases/20150401123456 DIR/srv/current\n    - rm -rf DIR/srv/current/log\n" +
			"    - ln -nfs DIR/srv/shared/log DIR/srv/current/log\n    - mkdir -p DIR/srv/current/tmp\n" +
			"    - ln -nfs DIR/srv/shared/pids DIR/srv/current/tmp/pids\n" + list("post") +
			"  success:\n" + list("success") + "  failure:\n" + list("failure") + "excludes:\n  - \"*.pid\"\n  - \"*.socket\"\n" + more
	}
	rails := archive{entries: []string{
		"d 755:1000:1000 ./", "d 755:1000:1000 ./app", "f 644:1000:1000 ./app/a.rb x", "d 755:1000:1000 ./log", "f 644:1000:1000 ./log/.keep ",
		"d 755:1000:1000 ./bin", "f 755:1000:1000 ./bin/rails x", "f 644:1000:1000 ./REVISION abc\n",
	}, name: "rails-application-20150401123456.tgz", filter: []string{"gzip"}}
	const before = "mkdir -p srv/releases/20150301000000 srv/shared/log srv/shared/pids; ln -s DIR/srv/releases/20150301000000 srv/current; rm srv/current"
	return withArchive([]oldCase{
		{name: "capistrano, its README's hooks", manifest: rendered(map[string]string{"failure": "cat >> HOOKS.log"}, ""), before: before},
		{name: "capistrano, by mv", manifest: rendered(nil, "\nsync_strategy: mv\n\n"), before: before},
		{name: "capistrano, with a service", before: before, manifest: rendered(map[string]string{
			"pre":     "echo pre >> HOOKS",
			"post":    "ln -nfs DIR/srv/shared/data DIR/srv/current/data\necho reload unicorn >> HOOKS\ncd DIR/srv/releases && ls -1t | tail -n +6 | xargs rm -rf",
			"success": "echo success >> HOOKS",
			"failure": "cat >> HOOKS.log",
		}, "")},
		{name: "capistrano, that notifies", before: before, env: []string{"STAGE=staging"}, manifest: rendered(map[string]string{
			"success": "test \"$(tail -n 1 | wc -l)\" = 1 && echo \":tada: Deployed at *$(basename DIR/x)* {{ env \"STAGE\" \"production\" }}\" >> HOOKS",
			"failure": "echo \":fire: failed\" >> HOOKS",
		}, "")},
		{name: "capistrano, whose post fails", before: before, manifest: rendered(map[string]string{
			"post": "test -e DIR/none", "success": "echo never >> HOOKS", "failure": "echo failure >> HOOKS",
		}, "")},
		{name: "capistrano, bundler in pre", before: before, manifest: rendered(map[string]string{
			"pre": "mkdir -p DIR/srv/shared/bundle\ntest -d DIR/srv/shared/bundle || exit 1", "post": "ln -nfs DIR/srv/shared/bundle DIR/srv/current/vendor",
		}, "")},
		{name: "capistrano, twice", before: before, manifest: rendered(nil, ""), then: &rails},
		{name: "a service with must_env", before: "mkdir srv/shared", env: []string{"APP_ENV=production", "SLACK=https://hooks.example.com/x"},
			manifest: "src: SRC\nchecksum: SUM\ndest: '{{ env \"DEST_DIR\" \"DEST\" }}'\ndest_mode: 0755\ncommands:\n  pre:\n    - 'echo {{ must_env \"APP_ENV\" }} >> HOOKS'\n" +
				"  post:\n    - ln -sfn DIR/srv/shared DEST/log\n    - chown -R 1000:1000 DEST\n  success:\n    - 'cat > /dev/null; echo curl {{ must_env \"SLACK\" }} >> HOOKS'\n" +
				"  failure:\n    - 'cat > /dev/null; echo failed >> HOOKS'\nexcludes:\n  - '*.pid'\n  - log\n"},
	}, rails)
}

// eventCases are ways in which a deployment is asked for.
func eventCases() []oldCase {
	const fails = "commands:\n  post: ['false']\n  failure: [echo failure >> HOOKS]\n"
	cases := withArchive([]oldCase{
		{name: "a URL without a line feed", input: "URL", manifest: hooks},
		{name: "a URL and more lines", input: "URL\nmore\n", manifest: hooks},
		{name: "an event", input: `[{"ID":"1","Name":"deploy","Payload":"URL64","NodeFilter":"","Version":1,"LTime":3}]`, manifest: hooks},
		{name: "several events", input: `[{"ID":"1","Payload":"Zm9v"},{"ID":"2","Payload":"URL64"}]`, env: []string{"CONSUL_INDEX=7"}, manifest: hooks},
		{name: "a watch without events", input: "[]\n", env: []string{"CONSUL_INDEX=7"}, manifest: hooks},
		{name: "a failure below a watch", input: `[{"ID":"2","Payload":"URL64"}]`, env: []string{"CONSUL_INDEX=7"}, manifest: fails},
		{name: "a failure by hand", manifest: fails},
		{name: "no events", differs: "no-events", input: "[]\n", manifest: hooks},
		{name: "no input", input: "\n", manifest: hooks},
		{name: "Serf", env: []string{"SERF_EVENT=user", "SERF_USER_EVENT=deploy"}, manifest: hooks},
	}, plain)
	for i := range cases {
		cases[i].byHand = true
	}
	return cases
}
