"""What each verb passes on."""

import sys

import pytest

from vlmtune.cli import main


def test_train_passes_everything_on(called):
    line = 'train my.py --work-dir w --resume --cfg-options lr=1e-5 tune.llm=full --seed 3 --launcher slurm'
    assert main([*line.split(), '--deepspeed', 'deepspeed_zero2', '--dry-run', '--cfg-options', 'x=None']) == 0
    assert called == [
        (
            'train',
            (),
            dict(
                config='my.py',
                work_dir='w',
                resume=True,
                overrides={'lr': 1e-5, 'tune.llm': 'full', 'x': None},
                seed=3,
                launcher='slurm',
                deepspeed='deepspeed_zero2',
                reset_optimizer=False,
                dry_run=True,
            ),
        )
    ]
    assert main(['train', 'my.py', '--resume', 'iter_5.pth']) == 0
    assert called[-1][2]['resume'] == 'iter_5.pth'
    assert main(['train', 'my.py']) == 0
    assert called[-1][2]['resume'] is False


@pytest.mark.parametrize('verb', ['train', 'chat'])
def test_a_seed_that_numpy_does_not_take_is_a_wrong_option(called, capsys, verb):
    assert main([verb, 'm', '--seed', str(2**32 - 1)]) == 0
    for wrong in (str(2**32), '-1', 'one'):
        with pytest.raises(SystemExit, match='2'):
            main([verb, 'm', '--seed', wrong])
        assert f"--seed: expected an integer, 0 to 4294967295, got '{wrong}'" in capsys.readouterr().err
    assert len(called) == 1


def test_data_verbs_pass_everything_on(called):
    assert main('check-data my.py --json --decode --cfg-options max_length=9'.split()) == 0
    assert called[-1] == (
        'check_data',
        (),
        dict(config='my.py', overrides={'max_length': 9}, as_json=True, decode=True),
    )
    asked = dict(config='my.py', overrides={'lr': 1})
    assert main('browse-data my.py --out p.html -n 3 --cfg-options lr=1'.split()) == 0
    assert called[-1] == ('browse_data', (), dict(asked, out='p.html', count=3, indices=None))
    assert main('browse-data my.py --text --indices 4 5'.split()) == 0
    assert called[-1] == ('browse_data', (), dict(asked, out=None, count=20, indices=[4, 5], overrides={}))


def test_check_data_gives_its_exit_code(called):
    sys.modules['vlmtune.apps.data.check_data'].check_data = lambda *args, **kwargs: 1
    assert main(['check-data', 'my.py']) == 1


def test_convert_and_chat_pass_everything_on(called):
    assert main('convert pth_to_hf c.py iter_1.pth out --fp32 --device cpu --format original'.split()) == 0
    options = dict(max_shard_size='5GB', dtype='float32', device='cpu', file_format='original')
    assert called[-1] == ('pth_to_hf', (), dict(options, config='c.py', checkpoint='iter_1.pth', output='out'))
    assert main('convert merge base adapter out --dtype bfloat16 --max-shard-size 2GB'.split()) == 0
    options = dict(max_shard_size='2GB', dtype='bfloat16', device='auto', file_format=None)
    assert called[-1] == ('merge', (), dict(options, base='base', adapter='adapter', output='out'))
    assert main('verify-model m --dtype auto --device cpu --json'.split()) == 0
    assert called[-1] == ('verify_model', (), dict(path='m', dtype='auto', device='cpu', output='json'))
    line = 'chat m --adapter a --image 1.png 2.png --prompt hi --system s --max-new-tokens 9 --temperature 0.5'
    line += ' --top-p 0.9 --top-k 4 --seed 1 --bits 4 --image 3.png --boxes --draw-boxes b.png'
    line += ' --example p.png Read. @p.md --example q.png Read. Nothing.'
    line += (
        ' --llava l --visual-encoder v --visual-select-layer -3 --prompt-template chatml --bot-name Ada --no-streamer'
    )
    line += ' --stop-words a b --command-stop-word c --answer-stop-word d --repetition-penalty 1.1 --offload-folder o'
    assert main(line.split()) == 0
    assert called[-1][1:] == (
        (),
        dict(
            model='m',
            adapter='a',
            images=['1.png', '2.png', '3.png'],
            prompt='hi',
            system='s',
            examples=[['p.png', 'Read.', '@p.md'], ['q.png', 'Read.', 'Nothing.']],
            max_new_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            seed=1,
            bits=4,
            boxes=True,
            draw_boxes='b.png',
            llava='l',
            visual_encoder='v',
            visual_select_layer=-3,
            system_template=None,
            prompt_template='chatml',
            bot_name='Ada',
            no_streamer=True,
            stop_words=['a', 'b', 'c', 'd'],
            repetition_penalty=1.1,
            offload_folder='o',
        ),
    )


def test_options_of_xtuners_chat_that_are_left_out_say_why(called, capsys):
    for line, says in (('--lagent', 'serve the model'), ('--with-plugins search', 'belong to the MOSS models')):
        assert main(['chat', 'm', *line.split()]) == 1
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f'error: {line.split()[0]} is left out: ')
        assert says in told
    assert called == []
